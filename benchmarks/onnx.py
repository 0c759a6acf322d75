"""`torch.onnx.export` alone beside `attnopt.onnx.export`: attention operators, nodes, latency, error.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.onnx [--full] [--only gpt2 rewrites ...]

Every file runs in ONNX Runtime on one CPU thread; times are medians of interleaved runs in one process, the error is
the largest distance from the PyTorch model that was exported. `rewrites` is the trained subject (512 bytes of Python
source, no attention mask) before and after every approximate rewrite, `factored` a Swin before and after `FactorBias`;
`torch.onnx.export` knows no rewritten model, so its row is the model before. Writes benchmarks/results/onnx.json and
onnx.md; rows of what is not run stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import attnopt
from attnopt.demo.models import find
from attnopt.errors import AttnoptError
from attnopt.onnx import export
from attnopt.onnx.session import Session
from attnopt.rewrites import FactorBias, Linearize, MixHeads, PruneHeads, ShareKV, Sparsify

RESULTS = Path(__file__).parent / "results"
ALONE, WAYS = "torch.onnx.export", ("onnx", "ort")
ANY = 1e9  # quality is measured by benchmarks/quality.py
REWRITES = (
    ("ShareKV, 4 of 8, mean", ShareKV(4, method="mean")),
    ("ShareKV, 4 of 8, aligned", ShareKV(4, method="aligned")),
    ("PruneHeads, a quarter", PruneHeads(fraction=0.25, score="magnitude")),
    ("MixHeads, 2 shared, 4 active", MixHeads(2, 4, always=True)),
    ("Linearize, elu", Linearize("elu", length=1 << 16)),
    (
        "Linearize, hedgehog, window 64",
        Linearize("hedgehog", window=64, steps=20, length=1 << 16, progress=False),
    ),
    ("Sparsify, window 128, 4 sinks", Sparsify("window", window=128, always=True)),
    ("Sparsify, 4 blocks of 64", Sparsify("blocks", top=4, always=True)),
)


@dataclass(frozen=True)
class Group:
    """A model with its inputs, and rewrites after each of which it is exported too; all are timed in turns."""

    title: str
    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rewrites: Sequence[tuple[str, Any]] = ()
    calibration: Any = field(default=None)

    def rows(self) -> Iterator[tuple[str, str, Any, Callable[[Path], None]]]:
        """Title, way, the model whose results are wanted, and what writes its file."""
        yield self.title, ALONE, self.model, lambda path: _alone(self.model, self.args, self.kwargs, path)
        for title, rewrite in (("", None), *self.rewrites):
            model = self.model if rewrite is None else self.rewritten(rewrite)
            for target in WAYS if rewrite is None else WAYS[1:]:
                yield (
                    f"{self.title}; {title}" if title else self.title,
                    f"attnopt, {target}",
                    model,
                    lambda path, model=model, target=target: _ours(model, self.args, self.kwargs, path, target),
                )

    def rewritten(self, rewrite: Any) -> Any:
        """The model after the rewrite."""
        return attnopt.optimize(
            self.model, self.args, self.kwargs, rewrites=[rewrite], tolerance=ANY, calibration=self.calibration,
            options={"kernel": "reference"}, validate=False,
        )  # fmt: skip


def groups(full: bool) -> dict[str, Callable[[], Group]]:
    """What can be measured, by name."""

    def demo(name: str, title: str = "", without: str = "") -> Callable[[], Group]:
        def build() -> Group:
            (row,) = find([name])
            model, args, kwargs = row.build(quick=not full)
            return Group(title or row.title, model, args, {k: x for k, x in kwargs.items() if k != without})

        return build

    def bert() -> Group:
        from benchmarks.models import ROWS

        row = next(r for r in ROWS if r.name == "bert")
        inputs = {name: x[:, : None if full else 128] for name, x in row.inputs().items()}
        return Group("BERT-large 1024, 2 layers, padded", row.build("eager", 2), (), inputs)

    found = {name: demo(name) for name in ("minilm", "gpt2", "llama", "t5", "swin", "vit", "gemma2")}
    found["llama"] = demo("llama", "Llama 2048, padded")
    found["llama-causal"] = demo("llama", "Llama 2048, no mask", "attention_mask")
    return {"bert": bert, **found, "rewrites": _subject, "factored": lambda: _factored(demo("swin")())}


def _subject() -> Group:
    from benchmarks.subject import load_subject
    from benchmarks.subject.model import windows
    from benchmarks.subject.text import stdlib

    text = stdlib()
    batches = [{"input_ids": x, "use_cache": False} for x in windows(text.train, 512, 4).split(1)]
    inputs = {"input_ids": windows(text.heldout, 512, 1), "use_cache": False}
    return Group("trained subject", load_subject(), (), inputs, REWRITES, batches)


def _factored(swin: Group) -> Group:
    rewrite = ("FactorBias, rank 8", FactorBias(rank=8, when="always"))
    return Group(swin.title, swin.model, swin.args, swin.kwargs, (rewrite,))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the demo's full sizes instead of its quick ones")
    parser.add_argument("--only", nargs="*", choices=groups(False), help="names of models, rewrites, factored")
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = groups(arguments.full)
    asked = arguments.only or list(known)
    for i, name in enumerate(asked):
        group = known[name]()
        print(f"[{i + 1}/{len(asked)}] {group.title}", flush=True)
        rows = measured(group, arguments.runs)
        print(table(rows), flush=True)
        write(RESULTS, name, rows, list(known))


def write(folder: Path, name: str, rows: list[dict[str, Any]], order: Sequence[str]) -> None:
    """Put the rows of one group into the results, those of other groups as they are."""
    path = folder / "onnx.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    held = {n: held[n] for n in order if n in held and n != name} | {name: rows}
    held = {n: held[n] for n in order if n in held}
    path.write_text(json.dumps(held, indent=1) + "\n")
    (folder / "onnx.md").write_text(table([row for rows in held.values() for row in rows]) + "\n")


def measured(group: Group, runs: int) -> list[dict[str, Any]]:
    """One row for each way to export, and for each rewrite."""
    found: list[dict[str, Any]] = []
    sessions: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, way, model, write_to in group.rows():
            path = Path(folder) / f"{len(found)}.onnx"
            row = {"model": title, "way": way, "attention": "", "nodes": 0, "ms": None, "error": None, "failed": ""}
            found.append(row)
            try:
                write_to(path)
                row |= counted(path)
                session = Session(path, threads=1)
                feed = _feed(session, group)
                out = session(list(feed), list(feed.values()))
            except Exception as error:
                row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                continue
            row["error"] = _largest(out, model, group)
            sessions[len(found) - 1] = (session, {n: t.numpy() for n, t in feed.items()})
            print(f"  {title}, {way}", flush=True)
        for place, ms in timed(sessions, runs).items():
            found[place]["ms"] = ms
    return found


def _feed(session: Session, group: Group) -> dict[str, torch.Tensor]:
    names = [x.name for x in session.session.get_inputs()]
    if all(n in group.kwargs for n in names):
        return {n: group.kwargs[n] for n in names}
    tensors = [x for x in (*group.args, *group.kwargs.values()) if isinstance(x, torch.Tensor)]
    return dict(zip(names, tensors, strict=True))


def _largest(out: Sequence[torch.Tensor], model: Any, group: Group) -> float:
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(*group.args, **group.kwargs))
    wanted = [x for x in wanted if isinstance(x, torch.Tensor)]
    return max((x - y).abs().max().item() for x, y in zip(out, wanted, strict=False))


def _alone(model: Any, args: Any, kwargs: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, str(path), kwargs=dict(kwargs), dynamo=True, opset_version=23, verbose=False)


def _ours(model: Any, args: Any, kwargs: Any, path: Path, target: str) -> None:
    report = export(model, args, path, kwargs, target=target)
    for site in report.sites:
        if site.status == "declined" and not site.kernel:
            raise AttnoptError(f"{site.module_path} was declined: {site.reason}")


def counted(path: Path) -> dict[str, Any]:
    """The attention operators of a file, and its nodes."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    names = Counter(n.op_type for n in nodes if "Attention" in n.op_type)
    text = ", ".join(f"{name} x{count}" for name, count in sorted(names.items()))
    return {"attention": text or "none", "nodes": len(nodes)}


def timed(sessions: Mapping[int, Any], runs: int) -> dict[int, float]:
    """Median milliseconds of each session, run in turns."""
    times: dict[int, list[float]] = {way: [] for way in sessions}
    for _ in range(runs):
        for way, (session, feed) in sessions.items():
            start = time.perf_counter()
            session.session.run(None, feed)
            times[way].append(1e3 * (time.perf_counter() - start))
    return {way: round(statistics.median(t), 2) for way, t in times.items() if t}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | export | attention operators | nodes | ms, one thread | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["failed"]:
            lines.append(f"| {r['model']} | {r['way']} | {r['attention']} | {r['nodes']} | fails | {r['failed']} |")
        else:
            figures = f"{r['nodes']} | {r['ms']} | {r['error']:.1e}"
            lines.append(f"| {r['model']} | {r['way']} | {r['attention']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
