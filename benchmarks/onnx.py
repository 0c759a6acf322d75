"""`torch.onnx.export` alone beside `attnopt.onnx.export`: attention operators, nodes, latency, error.

    python -m benchmarks.onnx [--full] [--only gpt2 ...]

Every file runs in ONNX Runtime on one CPU thread; times are medians of interleaved runs in one process, the error is
the largest distance from the PyTorch model. Writes benchmarks/results/onnx.json and onnx.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnopt.demo.models import find
from attnopt.errors import AttnoptError
from attnopt.onnx import export
from attnopt.onnx.session import Session

RESULTS = Path(__file__).parent / "results"
MODELS = ("minilm", "gpt2", "llama", "t5", "swin", "gemma2", "vit")
WAYS = ("torch.onnx.export", "attnopt, onnx", "attnopt, ort")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the demo's full sizes instead of its quick ones")
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="names of models")
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(find(arguments.only)):
        print(f"[{i + 1}/{len(arguments.only)}] {row.title}", flush=True)
        model, args, kwargs = row.build(quick=not arguments.full)
        rows += [{"model": row.title, **found} for found in measured(model, args, kwargs, arguments.runs)]
        print(table(rows[-len(WAYS) :]), flush=True)
        (RESULTS / "onnx.json").write_text(json.dumps(rows, indent=1) + "\n")
        (RESULTS / "onnx.md").write_text(table(rows) + "\n")


def measured(model: Any, args: Any, kwargs: Any, runs: int) -> list[dict[str, Any]]:
    """One row for each way to export."""
    with torch.no_grad():
        wanted = [x for x in torch.utils._pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, torch.Tensor)]
    tensors = [*args, *kwargs.values()]
    found: list[dict[str, Any]] = []
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            path = Path(folder) / f"{len(found)}.onnx"
            row: dict[str, Any] = {"way": way, "attention": "", "nodes": 0, "ms": None, "error": None, "failed": ""}
            found.append(row)
            try:
                _export(way, model, args, kwargs, path)
                row |= counted(path)
                session = Session(path, threads=1)
                names = [x.name for x in session.session.get_inputs()]
                out = session(names, tensors)
            except Exception as error:
                row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                continue
            row["error"] = max((x - y).abs().max().item() for x, y in zip(out, wanted, strict=False))
            sessions[way] = (session, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        times = timed(sessions, runs)
    for row in found:
        row["ms"] = times.get(row["way"])
    return found


def _export(way: str, model: Any, args: Any, kwargs: Any, path: Path) -> None:
    if way == WAYS[0]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, args, str(path), kwargs=kwargs, dynamo=True, opset_version=23, verbose=False)
        return
    report = export(model, args, path, kwargs, target=way.split()[-1])
    if report.declined:
        raise AttnoptError(f"{report.declined} sites were declined: {report.sites}")


def counted(path: Path) -> dict[str, Any]:
    """The attention operators of a file, and its nodes."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    names = Counter(n.op_type for n in nodes if "Attention" in n.op_type)
    text = ", ".join(f"{name} x{count}" for name, count in sorted(names.items()))
    return {"attention": text or "none", "nodes": len(nodes)}


def timed(sessions: dict[str, Any], runs: int) -> dict[str, float]:
    """Median milliseconds of each session, run in turns."""
    times: dict[str, list[float]] = {way: [] for way in sessions}
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
