"""`attnopt bench cpu`: measure the rows, print the table, write what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from attnopt.bench import show
from attnopt.bench.cases import cases
from attnopt.bench.costs import COSTS, Cost, cost
from attnopt.bench.measure import Result, measure
from attnopt.errors import OptionError

REPEATS = 9


def bench(
    only: Sequence[str] = (),
    quick: bool = False,
    threads: int = 1,
    flex: bool = False,
    json: str | None = None,
    markdown: str | None = None,
    plot: str | None = None,
) -> int:
    """Run the rows whose names contain one of `only`; 0 if every target is met, else 1. Raises `OptionError`."""
    named = [case.name for case in cases()] + list(COSTS)
    wanted = [name for name in named if not only or any(text in name for text in only)]
    if not wanted:
        raise OptionError(f"no row is called {' or '.join(only)}; there are {', '.join(named)}.")
    rows, before = [case for case in cases(quick) if case.name in wanted], torch.get_num_threads()
    about = f"{threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, medians of {REPEATS}"
    print(f"{about}{', short lengths' if quick else ''}", flush=True)
    results: list[Result] = []
    costs: list[Cost] = []
    try:
        for case in rows:
            print(*[] if results else [f"{show.head()}\n"], end="", sep="")
            results.append(measure(case, threads, 3 if quick else REPEATS, flex))
            print(show.line(show.cells(results[-1])), flush=True)
        for name in (name for name in COSTS if name in wanted):
            print(*[] if costs else [f"\n{show.cost_head()}\n"], end="", sep="")
            costs.append(cost(name, threads, quick))
            print(show.line(show.cost_cells(costs[-1])), flush=True)
    finally:
        torch.set_num_threads(before)
    if json:
        show.write_json(results, about, Path(json), costs)
    if markdown:
        Path(markdown).write_text(show.markdown(results, about, costs), encoding="utf-8")
    if plot:
        show.plot(results, about, Path(plot))
    return 0 if all(row.met for row in (*results, *costs)) else 1
