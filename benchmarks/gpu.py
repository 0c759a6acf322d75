"""One run on a GPU: is every kernel right on the chip, then how fast is the forward beside PyTorch's own.

    python benchmarks/gpu.py --out results        # correctness, then the table, as JSON and Markdown
    python benchmarks/gpu.py --dry                # the same steps on fake tensors, where there is no GPU

Outputs are poisoned, inputs random; errors are judged against fp64 by the rule of `attnopt.runtime.validate`. Times are
medians of CUDA events over a cleared L2 cache. The floor of a row is the larger of what the chip's measured rate of
bf16 products and its measured copy bandwidth allow. A row that fails says why and does not end the run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.aot.standard import layout_for, standard
from attnopt.codegen.triton_plans import CHIPS
from attnopt.options import Options
from attnopt.runtime.native import check_rows
from attnopt.runtime.triton_launch import TritonBackend, build, chip_of
from attnopt.spec import AttentionSpec, Heads

BUDGET = 480.0  # seconds: rows that would start later are left out, and said to be
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Row:
    """One line of the table: an attention, its sizes, and the share of scores that its mask keeps."""

    name: str
    spec: str
    heads: Heads
    batch: int
    n_q: int
    n_k: int
    kept: float = 1.0

    @property
    def flops(self) -> float:
        """Of both products, over what is kept."""
        return 2.0 * self.batch * self.heads.q * self.n_q * self.n_k * (self.heads.d_qk + self.heads.d_v) * self.kept

    @property
    def bytes(self) -> float:
        """Of q, k, v and the result, once each, in 16 bits."""
        heads = self.heads
        keys = self.batch * self.n_k * (heads.k * heads.d_qk + heads.v * heads.d_v)
        return 2.0 * (keys + self.batch * self.n_q * heads.q * (heads.d_qk + heads.d_v))


def _dense(width: int) -> Heads:
    return Heads(2048 // width, 2048 // width, 2048 // width, width, width)


_GROUPED = Heads(32, 8, 8, 128, 128)
ROWS = (
    *(Row(f"dense D={d}", "dense", _dense(d), 4, 4096, 4096) for d in (64, 128, 256)),
    *(Row(f"causal D={d}", "causal", _dense(d), 4, 4096, 4096, 0.5) for d in (64, 128, 256)),
    Row("window 1024", "window", _dense(128), 1, 16384, 16384, 1024 / 16384),
    *(Row(name, name, _dense(128), 4, 4096, 4096, kept)
      for name, kept in (("alibi", 0.5), ("softcap", 0.5), ("bias", 1.0), ("line", 1.0), ("padding", 1.0),
                         ("documents", 0.5), ("sigmoid", 0.5))),
    *(Row(f"decode {n // 1024}k", "dense", _GROUPED, 8, 1, n) for n in (8192, 32768, 131072)),
)  # fmt: skip


def inputs(spec: AttentionSpec, batch: int, n_q: int, n_k: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and captures; random."""
    heads = spec.heads
    shapes = ((heads.q, n_q, heads.d_qk), (heads.k, n_k, heads.d_qk), (heads.v, n_k, heads.d_v))
    made = [torch.randn(batch, *shape, device=device, dtype=dtype) for shape in shapes]
    sizes = {"bias": (heads.q, n_q, n_k), "line": (heads.q, n_q + n_k), "slope": (heads.q,), "sink": (heads.q,),
             "gate": (batch, heads.q, n_q), "pad": (batch, n_k), "doc": (batch, max(n_q, n_k))}  # fmt: skip
    for capture in spec.captures:
        shape = sizes[capture.name]
        if capture.kind == "float":
            made.append(torch.randn(shape, device=device))
        elif capture.name == "doc":
            made.append(torch.ones(shape, device=device, dtype=torch.int64).cumsum(-1) >> 10)
        else:
            made.append(torch.ones(shape, device=device, dtype=torch.int64))
    return made


def backend_of(spec: AttentionSpec, dtype: torch.dtype, chip: Any) -> TritonBackend:
    """The backend that the dispatcher would choose on this chip."""
    return build(spec, layout_for(spec, str(dtype).removeprefix("torch.")), chip, Options())


def correctness(chip: Any, device: str, run: bool) -> Iterator[dict[str, Any]]:
    """Every usual spec in every dtype at ragged lengths, by tiles and by splits."""
    for heads in (Heads(4, 2, 2, 64, 64), Heads(2, 2, 2, 128, 128), Heads(3, 1, 1, 80, 80)):
        for name, spec in standard(heads):
            for dtype in DTYPES:
                for n_q, n_k in ((257, 333), (1, 1100)):
                    about = {"spec": name, "width": heads.d_qk, "dtype": str(dtype), "sizes": (2, n_q, n_k)}
                    tensors = inputs(spec, 2, n_q, n_k, dtype, device)
                    yield about | attempt(lambda s=spec, t=tensors, d=dtype: judged(s, t, d, chip, run))  # type: ignore[misc]


def judged(spec: AttentionSpec, tensors: Sequence[Tensor], dtype: torch.dtype, chip: Any, run: bool) -> dict[str, Any]:
    """The verdict of one call; without `run`, everything up to it."""
    q, k, v, *captures = tensors
    backend = backend_of(spec, dtype, chip)
    if not run:
        return {"ok": True, "note": f"dry: {backend.kernel.plan}"}
    out, lse = backend(q, k, v, captures, ())
    verdict = check_rows(spec, (q, k, v), captures, (), out, lse, rows=q.shape[2])
    return {"ok": verdict.ok, "note": str(verdict)}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work returns, or why it failed."""
    try:
        return work()
    except Exception as error:
        return {
            "ok": False,
            "note": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        }


def clock(call: Callable[[], Any], repeats: int = 15) -> float:
    """Median seconds of a call, the L2 cache cleared before each."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """The chip's rate of bf16 products in FLOP/s, and its copy bandwidth in bytes/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return {
        "flops": 2.0 * 8192**3 / clock(lambda: a @ b),
        "bytes": 2.0 * source.nbytes / clock(lambda: target.copy_(source)),
    }


def measured(row: Row, spec: AttentionSpec, chip: Any, device: str, roof: dict[str, float] | None) -> dict[str, Any]:
    """Times of one row; without `roof`, everything up to them."""
    tensors = inputs(spec, row.batch, row.n_q, row.n_k, torch.bfloat16, device)
    q, k, v, *captures = tensors
    backend = backend_of(spec, torch.bfloat16, chip)
    if roof is None:
        return {"ok": True, "note": f"dry: {backend.kernel.plan}"}
    seconds = clock(lambda: backend(q, k, v, captures, ()))
    floor = max(row.flops / roof["flops"], row.bytes / roof["bytes"])
    found = {"ok": True, "ms": seconds * 1e3, "tflops": row.flops / seconds / 1e12, "floor": floor / seconds}
    if row.spec in ("dense", "causal"):
        grouped = row.heads.q != row.heads.k
        with contextlib.suppress(RuntimeError):
            other = clock(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=row.spec == "causal", enable_gqa=grouped)
            )
            found |= {"sdpa_ms": other * 1e3, "speedup": other / seconds}
    return found


def table(chip: Any, device: str, roof: dict[str, float] | None, begun: float) -> Iterator[dict[str, Any]]:
    """Every row of the table, as far as the time allows."""
    for row in ROWS:
        about = {"name": row.name, "sizes": (row.batch, row.n_q, row.n_k), "heads": str(row.heads)}
        if time.monotonic() - begun > BUDGET:
            yield about | {"ok": False, "note": "left out: no time was left"}
            continue
        spec = dict(standard(row.heads))[row.spec]
        yield about | attempt(lambda r=row, s=spec: measured(r, s, chip, device, roof))  # type: ignore[misc]


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    wrong = [c for c in report["correctness"] if not c["ok"]]
    right = len(report["correctness"]) - len(wrong)
    lines = [
        f"# {report['device']}, {report['date']}",
        f"torch {report['torch']}; {right} of {len(report['correctness'])} calls right.",
        "",
        *(f"- wrong: {c['spec']} {c['dtype']} width {c['width']} {c['sizes']}: {c['note']}" for c in wrong),
        "| attention | ms | TFLOP/s | of the floor | sdpa ms | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["table"]:
        cells = [_cell(row.get(x)) for x in ("ms", "tflops", "floor", "sdpa_ms", "speedup")]
        lines.append(f"| {row['name']} | {' | '.join(cells) if 'ms' in row else row['note']} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def run(dry: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything, in order. Raises `RuntimeError` where there is no GPU and this is no dry run."""
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; --dry takes the same steps on fake tensors.")
    begun = time.monotonic()
    chip = CHIPS["sm_90"] if dry else chip_of(torch.device("cuda"))
    checks = []
    for check in correctness(chip, "cuda", not dry):
        checks.append(check)
        if not check["ok"]:
            say(f"wrong: {check}")
    say(f"{sum(c['ok'] for c in checks)} of {len(checks)} calls right after {time.monotonic() - begun:.0f} s")
    roof = None if dry else ceilings()
    rows = []
    for row in table(chip, "cuda", roof, begun):
        rows.append(row)
        say(f"{row['name']:<16} {row.get('note') or ', '.join(f'{k} {_cell(row[k])}' for k in row if k in _FIGURES)}")
    return {
        "device": f"dry run for {chip.name}" if dry else torch.cuda.get_device_name(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "chip": asdict(chip),
        "roof": roof,
        "correctness": checks,
        "table": rows,
    }


_FIGURES = ("ms", "tflops", "floor", "sdpa_ms", "speedup")


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write. The status is 1 if any call was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", help="folder that receives gpu.json and gpu.md")
    parser.add_argument("--dry", action="store_true", help="fake tensors, no launch")
    arguments = parser.parse_args(argv)
    if arguments.dry:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            report = run(True)
    else:
        report = run(False)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "gpu.md").write_text(markdown(report))
    return 0 if all(c["ok"] for c in report["correctness"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
