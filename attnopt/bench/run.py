"""`attnopt bench cpu`: measure the rows, print the table, write what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from attnopt.bench import show
from attnopt.bench.cases import cases
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
    rows = [case for case in cases(quick) if not only or any(text in case.name for text in only)]
    if not rows:
        raise OptionError(f"no row is called {' or '.join(only)}; there are {', '.join(c.name for c in cases())}.")
    before, results = torch.get_num_threads(), []
    about = f"{threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, medians of {REPEATS}"
    print(f"{about}{', short lengths' if quick else ''}\n{show.head()}", flush=True)
    try:
        for case in rows:
            results.append(measure(case, threads, 3 if quick else REPEATS, flex))
            print(show.line(show.cells(results[-1])), flush=True)
    finally:
        torch.set_num_threads(before)
    _write(results, about, json, markdown, plot)
    return 0 if all(result.met for result in results) else 1


def _write(results: Sequence[Result], about: str, json: str | None, markdown: str | None, plot: str | None) -> None:
    if json:
        show.write_json(results, about, Path(json))
    if markdown:
        Path(markdown).write_text(show.markdown(results, about), encoding="utf-8")
    if plot:
        show.plot(results, about, Path(plot))
