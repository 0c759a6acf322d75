"""One model after another: golden, eager and ours; then the table."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnopt.api import optimize
from attnopt.demo import measure
from attnopt.demo.models import Row, find
from attnopt.demo.table import Screen
from attnopt.report import Site


@dataclass(frozen=True)
class Result:
    """One line of the table. Times are median seconds of a forward, memory is extra bytes at its peak."""

    name: str
    title: str
    note: str
    sites: int
    fused: int
    declined: int
    specs: tuple[str, ...]
    kernels: tuple[str, ...]
    declines: tuple[str, ...]
    eager_error: measure.Error
    error: measure.Error
    within_contract: bool
    eager_seconds: float
    seconds: float
    eager_memory: int | None
    memory: int | None
    optimize_seconds: float

    @property
    def good(self) -> bool:
        """Whether every site is fused and the output is within its contract."""
        return self.sites > 0 and self.declined == 0 and self.within_contract


@torch.no_grad()
def run_row(row: Row, quick: bool = False, say: Any = lambda step: None) -> Result:
    """Build the model, optimise it, and measure both. `say` is told the step that begins."""
    say("building")
    model, args, kwargs = row.build(quick)

    def eager() -> Any:
        return model(*args, **kwargs)

    def ours() -> Any:
        return fast(*args, **kwargs)

    say("optimising")
    start = time.perf_counter()
    fast = optimize(model, args, kwargs)
    optimize_seconds = time.perf_counter() - start
    say("golden in fp64")
    golden = measure.golden(model, args, kwargs)
    gc.collect()
    say("comparing")
    eager_error = measure.error(measure.tensors(eager()), golden)
    error = measure.error(measure.tensors(ours()), golden)
    good = measure.within_contract(error, eager_error, golden)
    say("timing")
    eager_seconds, seconds = measure.interleaved(eager, ours, budget=0.5 if quick else 3.0)
    say("memory")
    report = fast.report
    return Result(
        name=row.name, title=row.title, note="reduced by --quick" if quick else row.note,
        sites=len(report.sites), fused=report.fused, declined=report.declined,
        specs=tuple(map(str, report.specs)),
        kernels=tuple(sorted({site.kernel for site in report.sites if site.kernel})),
        declines=tuple(_decline(site) for site in report.sites if site.status == "declined"),
        eager_error=eager_error, error=error, within_contract=good,
        eager_seconds=eager_seconds, seconds=seconds,
        eager_memory=measure.peak_memory(eager), memory=measure.peak_memory(ours),
        optimize_seconds=optimize_seconds,
    )  # fmt: skip


def _decline(site: Site) -> str:
    return f"{site.module_path or site.name}: {site.reason} {site.source}"


def demo(names: Sequence[str] = (), quick: bool = False, json_path: str | None = None) -> int:
    """Run the rows and print the table. 0 if every site is fused and every output within its contract, else 1."""
    rows = find(list(names))
    started = time.perf_counter()
    with Screen(len(rows)) as screen:
        results = []
        for row in rows:
            results.append(run_row(row, quick, screen.step_of(row.title)))
            screen.done(results[-1])
            gc.collect()
    screen.table(results, time.perf_counter() - started)
    if json_path:
        rows_as_data = [{**asdict(result), "good": result.good} for result in results]
        Path(json_path).write_text(json.dumps(rows_as_data, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result.good for result in results) else 1
