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
from attnopt.analysis.tables import classes, classes_of, plan
from attnopt.expr import b, k, n_k, n_q, q
from attnopt.runtime.tables import Filled, algebra_on, fill
from tests.analysis.keeps import KEEPS, START, data, grids
from tests.analysis.test_blocks import truth


def _filled(keep: sp.Basic, grid: Grid, block: tuple[int, int]) -> tuple[Filled, np.ndarray]:
    sizes = {**dict(zip(ex.SIZES, grid.shape, strict=True)), START: grid.scalars.get("start", 0)}
    made = plan(keep)
    filled = fill(made, sizes, {name: torch.from_numpy(a) for name, a in grid.captures.items()}, block)
    ends = {table: tuple(x.numpy() for x in pair) for table, pair in filled.ends.items()}
    return filled, classes(made, ends, sizes, block).classes  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None, derandomize=True)
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


@settings(max_examples=120, deadline=None, derandomize=True)
@given(KEEPS, grids(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_tensors_are_classed_as_arrays_are(keep: sp.Basic, grid: Grid, block: tuple[int, int]) -> None:
    filled, wanted = _filled(keep, grid, block)
    sizes = {**dict(zip(ex.SIZES, grid.shape, strict=True)), START: grid.scalars.get("start", 0)}
    found = classes_of(plan(keep), filled.ends, sizes, block, algebra_on(torch.device("cpu")))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found.expand(wanted.shape), torch.from_numpy(wanted.copy()).long())


def test_ends_that_are_no_numbers_leave_a_tile_partial() -> None:
    row = np.array([[0.0] * 4 + [np.nan, 1.0] * 2 + [2.0] * 4])
    keep = ex.load("row", b, k) > 0
    grid = Grid((1, 1, 4, 12), {"row": row})
    made, sizes = plan(keep), dict(zip(ex.SIZES, grid.shape, strict=True))
    ends = fill(made, sizes, {"row": torch.from_numpy(row)}, (4, 4)).ends
    found = classes_of(made, ends, sizes, (4, 4), algebra_on(torch.device("cpu")))
    assert found.flatten().tolist() == [EMPTY, PARTIAL, FULL]


_MASK = sp.Ne(data("row", b, k), 0)
_SAME = sp.Eq(data("ids", b, q), data("ids", b, k))


def _grid(n: int, **captures: np.ndarray) -> Grid:
    return Grid((2, 1, n, n), captures)


def test_padding_row() -> None:
    row = np.array([[1] * 16, [0] * 5 + [1] * 6 + [0] * 5])
    filled, found = _filled(sp.And(_MASK, k <= q), _grid(16, row=row), (8, 4))
    assert filled.first is not None
    assert filled.last is not None
    assert (filled.first[:, 0].tolist(), filled.last[:, 0].tolist()) == ([0, 5], [15, 10])
    assert found[1, 0].tolist() == [[EMPTY, PARTIAL, EMPTY, EMPTY], [EMPTY, PARTIAL, PARTIAL, EMPTY]]
    assert found[0, 0].tolist() == [[PARTIAL, PARTIAL, EMPTY, EMPTY], [FULL, FULL, PARTIAL, PARTIAL]]


def test_a_row_that_keeps_nothing_has_an_empty_range() -> None:
    filled, found = _filled(_MASK, _grid(8, row=np.zeros((2, 8), int)), (4, 4))
    assert filled.first is not None
    assert filled.last is not None
    assert (filled.first.unique().tolist(), filled.last.unique().tolist()) == ([8], [-1])
    assert (found == EMPTY).all()


def test_lengths() -> None:
    length = np.array([3, 8])
    _, found = _filled(k < data("len", b), _grid(8, len=length), (8, 2))
    assert found[:, 0, 0].tolist() == [[FULL, PARTIAL, EMPTY, EMPTY], [FULL] * 4]


def test_documents_skip_what_lies_off_the_diagonal() -> None:
    ids = np.repeat(np.arange(8), 8)[None].repeat(2, 0)
    _, found = _filled(sp.And(_SAME, k <= q), _grid(64, ids=ids), (8, 8))
    assert (found[0, 0] == np.eye(8, dtype=int) * PARTIAL).all()
    _, found = _filled(_SAME, _grid(64, ids=ids), (4, 4))
    assert set(found[0, 0].ravel()) == {EMPTY, FULL}


def test_values_that_no_arithmetic_holds_leave_tiles_partial() -> None:
    ids = np.array([[2**62, -(2**62)] * 4, [0] * 8])
    _, found = _filled(sp.Eq(data("ids", b, q) + 1, data("ids", b, k)), _grid(8, ids=ids), (4, 4))
    assert (found[0] == PARTIAL).all()
    assert (found[1] == EMPTY).all()
    soft = np.array([[0.0, np.nan, 1.0, 1.0], [1.0] * 4])
    _, found = _filled(ex.load("soft", b, k) > 0.5, _grid(4, soft=soft), (4, 2))
    assert found[:, 0, 0].tolist() == [[PARTIAL, FULL], [FULL, FULL]]


def test_tables_are_linear_in_size() -> None:
    n, block = 1 << 14, (128, 64)
    captures = {"row": torch.ones(2, n, dtype=torch.bool), "ids": torch.zeros(2, n, dtype=torch.int64)}
    sizes = {ex.n_b: 2, ex.n_h: 4, n_q: n, n_k: n}
    filled = fill(plan(sp.And(_MASK, _SAME)), sizes, captures, block)
    shapes = {(t.load.args[0].name, t.axis): tuple(ends[0].shape) for t, ends in filled.ends.items()}
    assert shapes == {("row", "k"): (2, 1, n // 64), ("ids", "k"): (2, 1, n // 64), ("ids", "q"): (2, 1, n // 128)}
