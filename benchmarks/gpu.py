"""One run on a GPU, under nine minutes: is every kernel right on the chip, which plans are fastest, how fast is it.

    python benchmarks/gpu.py --out benchmarks/results        # gpu.json, gpu.md, gpu.png
    python benchmarks/gpu.py --dry                           # the same steps on fake tensors, where there is no GPU

1. Correctness: forward, decode and backward of every usual spec, in bf16, fp16 and fp32, against fp64 by the rule of
   `attnopt.runtime.validate`; free memory is filled with NaN first.
2. Tuning: every plan that the cost model proposes for a row of the table is compiled, in parallel, and then measured.
   What is chosen is kept in the cache folder, where the dispatcher finds it.
3. The table: times are medians of CUDA events over a cleared L2 cache, beside PyTorch's kernels by name, FlexAttention
   and what the chip's measured rates allow.

Whatever no time is left for is left out and said to be; what fails says why and does not end the run. Every phase has a
deadline, and what still runs after 525 s is left. A dry run prints how long all of it should take on the chip.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_parts import check, estimate, report, table
from gpu_parts.estimate import BUDGET, LAST
from gpu_parts.rows import ROWS, Row, judge

from attnopt._version import VERSION
from attnopt.codegen.triton_plans import CHIPS, Chip
from attnopt.options import Options
from attnopt.runtime.triton_compile import triton_version
from attnopt.runtime.triton_launch import chip_of

Say = Callable[[str], None]


def correctness(chip: Chip, dry: bool, only: Sequence[str], begun: float, say: Say) -> list[dict[str, Any]]:
    """Every call with its verdict."""
    wanted = check.checks(only)
    if dry:
        found = [check.attempt(lambda c=c: check.judged(c, chip, False)) for c in wanted]  # type: ignore[misc]
    else:
        found = list(check.share(check._work, [(c, chip.name) for c in wanted], begun + BUDGET["correctness"]))
    rows = [c.about | result for c, result in zip(wanted, found, strict=True)]
    for row in rows:
        if row["ok"] is False:
            say(f"wrong: {row}")
    say(f"{sum(bool(r['ok']) for r in rows)} of {len(rows)} calls right after {time.monotonic() - begun:.0f} s")
    return rows


def compile_plans(rows: Sequence[Row], chip: Chip, dry: bool, begun: float, say: Say) -> int:
    """Compile what tuning is going to measure; how many plans that is."""
    jobs = [(row, plan, chip.name) for row in rows for plan in table.plans(row, chip)]
    if not dry:
        failed = [r for r in check.share(check.warm, jobs, begun + BUDGET["compile"]) if not r["ok"]]
        say(f"{len(jobs) - len(failed)} of {len(jobs)} plans compiled after {time.monotonic() - begun:.0f} s")
    return len(jobs)


class OutOfTime(BaseException):
    """Nothing may catch it on the way, as what fails is caught."""


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Leave the body by `OutOfTime`, whatever it is at, when this time of the monotonic clock has come."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def measure(
    rows: Sequence[Row], chip: Chip, roof: dict[str, float] | None, options: Options, begun: float, say: Say
) -> list[dict[str, Any]]:
    """The table, as far as it gets until `LAST` seconds after the start."""
    found: list[dict[str, Any]] = []
    try:
        with until(begun + LAST):
            for row in table.table(rows, chip, "cuda", roof, options, begun + BUDGET["table"]):
                found.append(row)
                figures = ", ".join(f"{k} {report.cell(row[k])}" for k in report._FIGURES if k in row)
                say(f"{row['name']:<24} {figures or row['note']}")
            if roof:
                table.thorough(rows, found, "cuda", begun + BUDGET["thorough"])
    except OutOfTime:
        say(f"stopped after {LAST:.0f} s")
        found += [table.about(row) | {"ok": None, "note": table.LATE} for row in rows[len(found) :]]
    return found


def run(dry: bool, rows: Sequence[Row] = ROWS, only: Sequence[str] = (), say: Say = print) -> dict[str, Any]:
    """Everything, in order. Raises `RuntimeError` where there is no GPU and this is no dry run."""
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; --dry takes the same steps on fake tensors.")
    begun = time.monotonic()
    chip = CHIPS["sm_90"] if dry else chip_of(torch.device("cuda"))
    checks = correctness(chip, dry, only, begun, say)
    proposed = compile_plans(rows, chip, dry, begun, say)
    expected = estimate.seconds(rows, len(checks), {row.name: len(table.plans(row, chip)) for row in rows})
    say(estimate.text(expected))
    roof = None if dry else table.ceilings()
    found = measure(rows, chip, roof, Options.make({"tune": not dry}), begun, say)
    judge(found, {row.name: row.targets for row in rows})
    return {
        "device": f"dry run for {chip.name}" if dry else torch.cuda.get_device_name(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "command": "python " + shlex.join(["benchmarks/gpu.py", *sys.argv[1:]]),
        "seconds": time.monotonic() - begun,
        "expected": expected,
        "torch": torch.__version__,
        "triton": triton_version(),
        "attnopt": VERSION,
        "machine": platform.machine(),
        "chip": asdict(chip),
        "plans": proposed,
        "roof": roof,
        "correctness": checks,
        "table": found,
    }


def write(folder: Path, found: dict[str, Any], rows: Sequence[Row], say: Say = print) -> None:
    """`gpu.json`, `gpu.md` and, where something was measured, `gpu.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "gpu.md").write_text(report.markdown(found))
    named = {row.name: row for row in rows}
    points = [(r["name"], named[r["name"]].flops / named[r["name"]].bytes, r["tflops"]) for r in found["table"]
              if "tflops" in r]  # fmt: skip
    problem = report.roofline(found, points, folder / "gpu.png")
    if problem:
        say(problem)


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """Run, print, write. The status is 1 if any call was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", help="folder that receives gpu.json, gpu.md and gpu.png")
    parser.add_argument("--only", action="append", default=[], metavar="SPEC", help="check only this usual spec")
    parser.add_argument("--dry", action="store_true", help="fake tensors, no launch")
    arguments = parser.parse_args(argv)
    if arguments.dry:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            found = run(True, rows, arguments.only)
    else:
        found = run(False, rows, arguments.only)
    if arguments.out:
        write(Path(arguments.out), found, rows)
    return 1 if any(c["ok"] is False for c in found["correctness"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
