"""Intervals hold every value in the box, with symbolic and with numpy ends."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.analysis.intervals import NUMERIC, SYMBOLIC, decide, interval
from attnopt.expr import FloorDiv, Mod, b, k, n_k, q
from tests.analysis.keeps import START, STATIC_KEEPS

_EXPRESSIONS = st.recursive(
    st.sampled_from([q, k, sp.Integer(3), START, n_k]),
    lambda inner: st.one_of(
        st.builds(lambda x, y: sp.expand(x + y), inner, inner),
        st.builds(lambda c, x: sp.expand(c * x), st.integers(-3, 3), inner),
        st.builds(FloorDiv, inner, st.integers(1, 5).map(sp.Integer)),
        st.builds(Mod, inner, st.integers(1, 5).map(sp.Integer)),
        st.builds(ex.Maximum, inner, inner),
        st.builds(ex.Minimum, inner, inner),
        st.builds(lambda x, y: ex.Where(x >= 2, x, y), inner, inner),
        st.builds(sp.Abs, inner),
    ),
    max_leaves=5,
)
_RANGES = st.tuples(st.integers(0, 9), st.integers(0, 5))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_EXPRESSIONS, _RANGES, _RANGES)
def test_every_value_lies_inside(e: sp.Expr, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    fixed = {START: sp.Integer(4), n_k: sp.Integer(20)}
    box = {symbol: (first, first + more) for symbol, (first, more) in ((q, queries), (k, keys))}
    numeric = interval(e, {**box, **{s: (int(v), int(v)) for s, v in fixed.items()}}, NUMERIC)
    symbolic = interval(e, {s: (sp.Integer(x), sp.Integer(y)) for s, (x, y) in box.items()}, SYMBOLIC)
    assert (numeric is None) == (symbolic is None)
    if numeric is None or symbolic is None:
        return
    ends = [int(end.xreplace(fixed).doit()) for end in symbolic]
    for query in range(box[q][0], box[q][1] + 1):
        for key in range(box[k][0], box[k][1] + 1):
            value = int(e.xreplace({**fixed, q: sp.Integer(query), k: sp.Integer(key)}).doit())
            assert numeric[0] <= value <= numeric[1]
            assert ends[0] <= value <= ends[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STATIC_KEEPS, _RANGES, _RANGES)
def test_decisions_are_never_wrong(keep: sp.Basic, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    fixed = {START: 4, n_k: 20, ex.n_q: 15}
    box = {symbol: (first, first + more) for symbol, (first, more) in ((q, queries), (k, keys))}
    possible, sure = decide(ex.canon(keep), {**box, **{s: (v, v) for s, v in fixed.items()}})
    at = {s: sp.Integer(v) for s, v in fixed.items()}
    values = [
        bool(keep.xreplace({**at, q: sp.Integer(i), k: sp.Integer(j)}))
        for i in range(box[q][0], box[q][1] + 1)
        for j in range(box[k][0], box[k][1] + 1)
    ]
    assert possible or not any(values)
    assert all(values) or not sure


def test_ends_may_be_arrays() -> None:
    low, high = interval(FloorDiv(k, 4) - q, {k: (np.array([0, 8]), np.array([7, 15])), q: (1, 2)}, NUMERIC) or ((), ())
    assert (low.tolist(), high.tolist()) == ([-2, 0], [0, 2])


UNKNOWN = (ex.load("x", q), q * k, FloorDiv(q, k), sp.exp(q), Mod(q, n_k))


@pytest.mark.parametrize("e", UNKNOWN, ids=str)
def test_what_is_unknown_has_no_interval(e: sp.Expr) -> None:
    box = {q: (1, 3), k: (1, 2), n_k: (5, 5)}
    assert interval(e, box, NUMERIC) is None
    assert decide(sp.Ge(e, 0, evaluate=False), box) == (True, False)


def test_a_load_with_known_ends_counts() -> None:
    load = ex.load("ids", b, k, integer=True)
    assert interval(2 * load + 1, {load: (3, 5)}, NUMERIC) == (7, 11)


def test_infinite_ends_decide_nothing() -> None:
    x, y = ex.load("x", q, integer=True), ex.load("x", k, integer=True)
    box = {x: (np.float64(-np.inf), np.float64(np.inf)), y: (np.float64(-np.inf), np.float64(np.inf))}
    for condition in (sp.Ge(x - y, 0), sp.Gt(x - y, 0), sp.Eq(x - y, 0), sp.Ne(x - y, 0), sp.Not(sp.Ge(x + y, 0))):
        possible, sure = decide(condition, box)
        assert possible
        assert not sure
