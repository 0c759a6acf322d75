"""Run-time tables against the dense mask."""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL
from attnopt.analysis.grid import Grid
from attnopt.analysis.tables import classes, plan
from attnopt.expr import b, k, n_k, n_q, q
from attnopt.runtime.tables import Filled, fill
from tests.analysis.keeps import KEEPS, START, data, grids
from tests.analysis.test_blocks import truth


def _filled(keep: sp.Basic, grid: Grid, block: tuple[int, int]) -> tuple[Filled, np.ndarray]:
    sizes = {**dict(zip(ex.SIZES, grid.shape, strict=True)), START: grid.scalars.get("start", 0)}
    made = plan(keep)
    filled = fill(made, sizes, {name: torch.from_numpy(a) for name, a in grid.captures.items()}, block)
    ends = {table: tuple(x.numpy() for x in pair) for table, pair in filled.ends.items()}
    return filled, classes(made, ends, sizes, block).classes  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(KEEPS, grids(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_classes_are_never_wrong(keep: sp.Basic, grid: Grid, block: tuple[int, int]) -> None:
    filled, found = _filled(keep, grid, block)
    dense = grid.dense(keep)
    found = np.broadcast_to(found, (*grid.shape[:2], *found.shape[-2:]))
    for place in np.ndindex(*grid.shape[:2]):
        want = truth(dense[place], block)
        assert not ((found[place] == FULL) & (want != FULL)).any()
        assert not ((found[place] == EMPTY) & (want != EMPTY)).any()
    if filled.first is not None and filled.last is not None:
        kept = np.nonzero(dense)
        first, last = (np.broadcast_to(x.numpy(), grid.shape[:2])[kept[:2]] for x in (filled.first, filled.last))
        assert (kept[3] >= first).all()
        assert (kept[3] <= last).all()
