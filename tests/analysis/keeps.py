"""Random masks: what attention masks are made of, each in several spellings, and grids to evaluate them on."""

from __future__ import annotations

import numpy as np
import sympy as sp
from hypothesis import strategies as st

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.expr import FloorDiv, Mod, b, h, k, n_k, n_q, q

START = ex.scalar("start")
SHIFTS = (sp.S.Zero, n_k - n_q, START, sp.Integer(2), sp.Integer(-1))
_SMALL = st.integers(0, 4)
_WIDTH = st.integers(1, 4)


def data(name: str, *index: sp.Expr) -> sp.Expr:
    """An element of an integer capture."""
    return ex.load(name, *index, integer=True)


@st.composite
def _causal(draw: st.DrawFn) -> sp.Basic:
    p = q + draw(st.sampled_from(SHIFTS))
    return draw(
        st.sampled_from(
            [k <= p, p >= k, p + 1 > k, sp.Not(k > p), k - p < 1, 2 * k <= 2 * p + 1, sp.Eq(ex.Maximum(k, p), p),
             sp.Eq(ex.Where(k > p, 1, 0), 0), sp.Ge(sp.Rational(1, 2) * (p - k), 0), FloorDiv(p - k, 3) >= 0]
        )
    )  # fmt: skip


@st.composite
def _window(draw: st.DrawFn) -> sp.Basic:
    p, left, right = q + draw(st.sampled_from(SHIFTS)), draw(_SMALL), draw(_SMALL)
    return draw(
        st.sampled_from(
            [sp.And(k >= p - left, k <= p + right), sp.Abs(k - p) <= left, sp.Not(sp.Abs(p - k) > right), p - k < left + 1,
             sp.Eq(FloorDiv(p - k, left + 1), 0), k >= ex.Maximum(0, p - left), sp.And(k > p - left, k <= p),
             ex.Minimum(k - p + left, p - k + right) >= 0]
        )
    )  # fmt: skip


@st.composite
def _blocks(draw: st.DrawFn) -> sp.Basic:
    w, o, far = draw(_WIDTH), draw(_SMALL), draw(_SMALL)
    return draw(
        st.sampled_from(
            [sp.Eq(FloorDiv(k, w), FloorDiv(q, w)), sp.Eq(k - Mod(k, w), q - Mod(q, w)), FloorDiv(k, w) <= FloorDiv(q, w),
             sp.Abs(FloorDiv(k + o, w) - FloorDiv(q + o, w)) <= far, sp.Eq(FloorDiv(k, 2 * w), FloorDiv(FloorDiv(q, w), 2)),
             sp.Eq(FloorDiv(k - data("low", b), w), FloorDiv(q - data("low", b), w)), FloorDiv(k, w) <= FloorDiv(q, o + 1),
             sp.And(k >= w * FloorDiv(q, w), k < w * FloorDiv(q, w) + w), k <= q - Mod(q, w) + w - 1]
        )
    )  # fmt: skip


@st.composite
def _grid(draw: st.DrawFn) -> sp.Basic:
    w, far, near = draw(st.integers(2, 4)), draw(_SMALL), draw(_SMALL)
    rows = sp.Abs(FloorDiv(k, w) - FloorDiv(q, w)) <= far
    columns = sp.Abs(Mod(k, w) - Mod(q, w)) <= near
    ragged = sp.Abs((k - w * FloorDiv(k, w)) - (q - w * FloorDiv(q, w))) <= near
    deep = sp.Abs(Mod(FloorDiv(k, 2), w) - Mod(FloorDiv(q, 2), w)) <= near
    return draw(st.sampled_from([sp.And(rows, columns), sp.And(rows, ragged), columns, deep, sp.And(rows, deep)]))


@st.composite
def _stride(draw: st.DrawFn) -> sp.Basic:
    m, r, o = draw(st.integers(1, 5)), draw(_SMALL), draw(_SMALL)
    return draw(
        st.sampled_from(
            [sp.Eq(Mod(q - k, m), 0), sp.Eq(Mod(k - q + o, m), r), sp.Eq(Mod(k, m), Mod(q, m)), sp.Eq(Mod(k + o, m), r),
             sp.Ne(Mod(q - k, m), r), Mod(k, m) >= r, Mod(o - k, m) < r, sp.Eq(k, m * FloorDiv(k, m)), Mod(k - START, m) <= r]
        )
    )  # fmt: skip


@st.composite
def _keys(draw: st.DrawFn) -> sp.Basic:
    n = draw(
        st.sampled_from(
            [sp.Integer(draw(_SMALL)), START, data("len", b), data("low", b), n_k - 2, n_k - data("len", b)]
        )
    )
    return draw(
        st.sampled_from([k < n, sp.Not(k >= n), k >= n, n_k - 1 - k < n, k <= ex.Maximum(q, n - 1), sp.Ne(k, n)])
    )


@st.composite
def _loads(draw: st.DrawFn) -> sp.Basic:
    ids = data("ids", b, q), data("ids", b, k)
    return draw(
        st.sampled_from(
            [sp.Ne(data("row", b, k), 0), sp.Eq(data("row", b, k), 0), sp.Eq(*ids), sp.Ne(*ids), ids[0] >= ids[1],
             ids[1] > ids[0], sp.Ne(data("pair", q, k), 0), sp.Ne(data("row", b, q), 0), ex.load("soft", b, k) > 0.5,
             k <= data("ids", b, q), data("ids", b, k) <= q, sp.Eq(data("ids", b, k), data("row", b, k)), h < 1, q >= 2,
             sp.Ne(data("row", b, FloorDiv(k, 2)), 0), sp.Eq(FloorDiv(data("ids", b, k), 2), FloorDiv(data("ids", b, q), 2)),
             k <= q + data("heads", h), sp.Eq(ex.Where(k >= 3, 1, 0), ex.Where(q >= 2, 1, 0)), q * k < 9]
        )
    )  # fmt: skip


STATIC = st.one_of(_causal(), _window(), _blocks().filter(lambda c: not c.has(ex.Load)), _grid(), _stride())
PARTS = st.one_of(_causal(), _window(), _blocks(), _grid(), _stride(), _keys(), _loads())


def _combined(leaves: st.SearchStrategy[sp.Basic]) -> st.SearchStrategy[sp.Basic]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(sp.And, inner, inner), st.builds(sp.Or, inner, inner), st.builds(sp.Not, inner)
        ),
        max_leaves=4,
    )


KEEPS, STATIC_KEEPS = _combined(PARTS), _combined(STATIC)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Small sizes, n_q and n_k apart, with every capture that `KEEPS` mentions."""
    shape = 2, 2, draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng, long = np.random.default_rng(draw(st.integers(0, 2**16))), max(shape)
    captures = {
        "row": rng.integers(0, 2, (2, long)),
        "ids": np.sort(rng.integers(0, 4, (2, long)), axis=-1),
        "pair": rng.integers(0, 2, (long, long)),
        "soft": rng.random((2, long)),
        "len": rng.integers(0, long + 2, 2),
        "low": rng.integers(0, 4, 2),
        "heads": rng.integers(0, 3, 2),
    }
    return Grid(shape, captures, {"start": draw(st.integers(-2, 9))})
