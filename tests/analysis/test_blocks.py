"""Classes of tiles against the dense mask, and how tight they are."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL, BlockMap, block_map, tile_class, tile_ends
from attnopt.analysis.grid import Array, Grid
from attnopt.expr import FloorDiv, Mod, h, k, n_b, n_h, n_k, n_q, q
from tests.analysis.keeps import KEEPS, START, STATIC_KEEPS, data, grids


def truth(dense: Array, block: tuple[int, int]) -> Array:
    """The class of every tile of a dense mask `[q, k]`."""
    starts = [np.arange(0, size, step) for size, step in zip(dense.shape, block, strict=True)]
    every = np.logical_and.reduceat(np.logical_and.reduceat(dense, starts[0], 0), starts[1], 1)
    some = np.logical_or.reduceat(np.logical_or.reduceat(dense, starts[0], 0), starts[1], 1)
    return np.where(every, FULL, np.where(some, PARTIAL, EMPTY))


def _sizes(grid: Grid) -> dict[sp.Symbol, int]:
    return {**dict(zip(ex.SIZES, grid.shape, strict=True)), START: grid.scalars["start"]}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.one_of(KEEPS, STATIC_KEEPS), grids(), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_a_class_is_never_wrong(keep: sp.Basic, grid: Grid, block: tuple[int, int]) -> None:
    found = block_map(keep, _sizes(grid), block).classes
    for dense in grid.dense(keep).reshape(-1, *grid.shape[2:]):
        want = truth(dense, block)
        assert not ((found == FULL) & (want != FULL)).any()
        assert not ((found == EMPTY) & (want != EMPTY)).any()


_GRID = sp.And(sp.Abs(FloorDiv(k, 16) - FloorDiv(q, 16)) <= 2, sp.Abs(Mod(k, 16) - Mod(q, 16)) <= 2)
# Name, mask, share of tiles of 8 by 8 that are partial for the arithmetic but not in truth.
TIGHT = (
    ("causal", k <= q, 0),
    ("bottom-right", k <= q + n_k - n_q, 0),
    ("window", sp.And(k <= q, k > q - 20), 0),
    ("chunked", sp.And(k <= q, sp.Eq(FloorDiv(k, 16), FloorDiv(q, 16))), 0),
    ("blocks", sp.Eq(FloorDiv(k, 8), FloorDiv(q, 8)), 0),
    ("odd blocks", sp.Eq(FloorDiv(k, 12), FloorDiv(q, 12)), 0),
    ("block-causal", FloorDiv(k, 16) <= FloorDiv(q, 16), 0),
    ("prefix", sp.Or(k <= q, k < 13), 0),
    ("first keys and window", sp.And(k <= q, sp.Or(k < 4, q - k < 24)), 0),
    ("dilated", sp.And(k <= q, sp.Eq(Mod(q - k, 4), 0)), 0),
    ("rows", sp.Abs(FloorDiv(k, 16) - FloorDiv(q, 16)) <= 1, 0),
    ("strided", Mod(k, 32) >= 24, 0),
    ("neighbourhood", _GRID, 0),
)


@pytest.mark.parametrize(("name", "keep", "slack"), TIGHT, ids=[row[0] for row in TIGHT])
def test_classes_are_tight(name: str, keep: sp.Basic, slack: float) -> None:
    grid = Grid((1, 1, 96, 128))
    found, want = block_map(keep, _grid_sizes(grid), (8, 8)).classes, truth(grid.dense(keep)[0, 0], (8, 8))
    assert np.mean(found != want) <= slack, f"{name}: {np.mean(found != want):.3f}"


def _grid_sizes(grid: Grid) -> dict[sp.Symbol, int]:
    return dict(zip(ex.SIZES, grid.shape, strict=True))


def test_ranges_list_what_is_not_empty() -> None:
    keep = sp.And(k <= q, sp.Or(k < 8, q - k < 16))
    found = block_map(keep, {n_q: 64, n_k: 64}, (8, 8))
    assert found.ranges(0) == ((0, 1),)
    assert found.ranges(6) == ((0, 1), (4, 7))
    assert found.ranges(6, FULL) == ((0, 1), (5, 6))
    assert sum(found.counts()) == 64
    assert BlockMap(np.zeros((1, 4), np.int8), (8, 8)).ranges(0) == ()


def test_ranges_are_of_one_entry_and_head() -> None:
    with pytest.raises(ValueError, match="4 axes"):
        BlockMap(np.zeros((1, 1, 2, 2), np.int8), (8, 8)).ranges(0)


def test_a_mask_by_head_is_classed_for_all_heads_or_for_one() -> None:
    keep, sizes = k <= q + 8 * h, {n_q: 16, n_k: 32, n_h: 3, n_b: 1}
    assert block_map(keep, sizes, (8, 8)).classes[0].tolist() == [PARTIAL, PARTIAL, PARTIAL, EMPTY]
    assert block_map(keep, {**sizes, h: 2}, (8, 8)).classes[0].tolist() == [FULL, FULL, PARTIAL, EMPTY]
    without = block_map(keep, {n_q: 16, n_k: 32}, (8, 8)).classes
    assert without[0].tolist() == [PARTIAL] * 4


def test_the_last_tile_may_be_short() -> None:
    assert [e.tolist() for e in tile_ends(10, 4)] == [[0, 4, 8], [3, 7, 9]]
    assert block_map(k <= q, {n_q: 10, n_k: 10}, (4, 4)).classes[2].tolist() == [FULL, FULL, PARTIAL]
    assert tile_class(k <= q, (8, 10), (0, 8), {n_q: 10, n_k: 10}) == FULL


def test_known_ends_of_a_load_class_its_tiles() -> None:
    load = data("row", k)
    known = {load: (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]))}
    assert block_map(sp.Ne(load, 0), {n_q: 8, n_k: 12}, (8, 4), known).classes.tolist() == [[EMPTY, PARTIAL, FULL]]
    assert block_map(sp.Ne(load, 0), {n_q: 8, n_k: 12}, (8, 4)).classes.tolist() == [[PARTIAL] * 3]
