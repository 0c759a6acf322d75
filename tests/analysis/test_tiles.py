"""Key ranges against the dense mask."""

from __future__ import annotations

import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.analysis.tiles import analyse, classify, evaluate, key_ranges, q0, q1
from attnopt.expr import h, k, n_k, n_q, q
from attnopt.spec import AttentionSpec, Heads
from tests.analysis.keeps import START, STATIC_KEEPS

_NUMBER = st.integers(-12, 12)
_FACTOR = st.integers(-3, 3)


@st.composite
def _clauses(draw: st.DrawFn) -> sp.Basic:
    kind = draw(st.sampled_from(["affine", "equal", "mod", "head"]))
    a, c, t = draw(_FACTOR), draw(_FACTOR), draw(_NUMBER)
    rest = c * q + t + draw(st.sampled_from([sp.S.Zero, n_k - n_q, n_k]))
    if kind == "mod":
        return sp.Eq(ex.Mod(q - k, 3), 0)
    if kind == "equal":
        return sp.Eq(a * k + rest, 0)
    return a * k + rest + (h * 4 if kind == "head" else 0) >= 0


_MASKS = st.recursive(
    _clauses(),
    lambda inner: st.one_of(
        st.builds(lambda x, y: sp.And(x, y), inner, inner), st.builds(lambda x, y: sp.Or(x, y), inner, inner)
    ),
    max_leaves=4,
)


def _holds(keep: sp.Basic, values: dict[sp.Symbol, int]) -> bool:
    return bool(keep.xreplace({symbol: sp.Integer(x) for symbol, x in values.items()}))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.one_of(_MASKS, STATIC_KEEPS), st.integers(1, 9), st.integers(1, 12), st.data())
def test_ranges_are_sound(mask: sp.Basic, queries: int, keys: int, data: st.DataObject) -> None:
    keep = ex.canon(mask)
    first = data.draw(st.integers(0, queries - 1))
    last = data.draw(st.integers(first + 1, queries))
    sizes = {n_q: queries, n_k: keys, h: data.draw(st.integers(0, 2)), START: 3}
    lo, hi, full_lo, full_hi = (evaluate(e, {**sizes, q0: first, q1: last}) for e in key_ranges(analyse(keep).bounds))
    for row in range(first, last):
        for key in range(keys):
            kept = _holds(keep, {**sizes, q: row, k: key})
            assert not kept or lo <= key < hi
            assert kept or not full_lo <= key < full_hi


def _spec(keep: sp.Basic) -> AttentionSpec:
    return AttentionSpec(Heads(1, 1, 1, 8, 8), keep=keep)


def test_causal_is_exact() -> None:
    sizes = {n_q: 100, n_k: 100}
    assert classify(_spec(k <= q), (16, 32), (0, 16), sizes) == "full"
    assert classify(_spec(k <= q), (16, 32), (16, 32), sizes) == "partial"
    assert classify(_spec(k <= q), (16, 32), (32, 48), sizes) == "empty"


def test_bottom_right_and_window_are_exact() -> None:
    sizes = {n_q: 10, n_k: 100}
    assert classify(_spec(k <= q + n_k - n_q), (0, 10), (0, 91), sizes) == "full"
    window = sp.And(k <= q + n_k - n_q, k > q + n_k - n_q - 20)
    assert classify(_spec(window), (0, 10), (0, 71), sizes) == "empty"
    assert classify(_spec(window), (0, 10), (0, 72), sizes) == "partial"
    assert classify(_spec(window), (9, 10), (0, 80), sizes) == "empty"
    assert classify(_spec(window), (0, 10), (80, 91), sizes) == "full"


def test_union_with_a_prefix_is_one_range() -> None:
    assert classify(_spec(sp.Or(k < 5, k <= q)), (4, 8), (0, 5), {n_q: 20, n_k: 20}) == "full"
    assert classify(_spec(sp.Or(k < 5, k <= q)), (0, 3), (5, 20), {n_q: 20, n_k: 20}) == "empty"


_BLOCK = sp.Eq(ex.FloorDiv(k, 16), ex.FloorDiv(q, 16))
_ROWS = sp.Abs(ex.FloorDiv(k, 16) - ex.FloorDiv(q, 16)) <= 1
# Name, mask, tile of queries, and the ends `lo, hi, full_lo, full_hi` for 64 queries by 64 keys.
ENDS = (
    ("chunked", sp.And(k <= q, _BLOCK), (20, 24), (16, 24, 16, 21)),
    ("blocks", _BLOCK, (20, 24), (16, 32, 16, 32)),
    ("blocks across a border", _BLOCK, (12, 20), (0, 32, 16, 16)),
    ("block-causal", ex.FloorDiv(k, 16) <= ex.FloorDiv(q, 16), (16, 32), (0, 32, 0, 32)),
    ("coarse queries", k <= ex.FloorDiv(q, 2), (16, 32), (0, 16, 0, 9)),
    ("neighbourhood", sp.And(_ROWS, sp.Abs(ex.Mod(k, 16) - ex.Mod(q, 16)) <= 2), (32, 36), (16, 64, 0, 0)),
    ("dilated", sp.And(k <= q, sp.Eq(ex.Mod(q - k, 2), 0)), (8, 16), (0, 16, 0, 0)),
    ("clamped", k >= ex.Minimum(ex.Maximum(q - 4, 0), n_k - 9), (8, 12), (4, 64, 7, 64)),
    ("first keys and window", sp.And(k <= q, sp.Or(k < 4, q - k < 8)), (32, 36), (0, 36, 28, 33)),
)


@pytest.mark.parametrize(("name", "keep", "tile", "ends"), ENDS, ids=[e[0] for e in ENDS])
def test_ends_are_tight(name: str, keep: sp.Basic, tile: tuple[int, int], ends: tuple[int, ...]) -> None:
    sizes = {n_q: 64, n_k: 64, q0: tile[0], q1: tile[1]}
    found = tuple(evaluate(e, sizes) for e in key_ranges(analyse(ex.canon(keep)).bounds))
    assert found[:2] == ends[:2]
    assert found[2:] == ends[2:] or (found[2] >= found[3] and ends[2] >= ends[3])


def test_classes_see_what_ranges_do_not() -> None:
    far = sp.And(k <= q, sp.Or(k < 4, q - k < 8))
    assert classify(_spec(far), (32, 36), (8, 16), {n_q: 64, n_k: 64}) == "empty"
    columns = sp.Abs(ex.Mod(k, 16) - ex.Mod(q, 16)) <= 2
    assert classify(_spec(columns), (32, 36), (24, 32), {n_q: 64, n_k: 64}) == "empty"


def test_data_leaves_no_tile_full_and_coordinates_still_count() -> None:
    pad = sp.Ne(ex.load("pad", ex.b, k, integer=True), 0)
    split = analyse(ex.canon(sp.And(pad, k <= q)))
    assert split.static == (q - k >= 0)
    assert split.residual == pad
    sizes = {n_q: 20, n_k: 20}
    assert classify(_spec(sp.And(pad, k <= q)), (10, 12), (0, 4), sizes) == "partial"
    assert classify(_spec(sp.And(pad, k <= q)), (10, 12), (12, 20), sizes) == "empty"


def test_constants() -> None:
    sizes = {n_q: 4, n_k: 4}
    assert classify(_spec(sp.true), (0, 4), (0, 4), sizes) == "full"
    assert classify(_spec(sp.false), (0, 4), (0, 4), sizes) == "empty"


def test_a_disjunction_of_many_ranges_keeps_its_hull() -> None:
    keep = sp.Or(*(sp.And(sp.Eq(q, i), k >= i, k < i + 3) for i in range(0, 24, 2)))
    found = analyse(ex.canon(keep)).bounds
    sizes = {n_q: 40, n_k: 40, q0: 0, q1: 4}
    assert [evaluate(e, sizes) for e in key_ranges(found)[:2]] == [0, 5]
    assert classify(_spec(keep), (0, 1), (0, 3), {n_q: 40, n_k: 40}) == "full"
    assert sum(e.count_ops() for e in key_ranges(found)) < 2000
