"""Splitting a logit into score and mask changes no row of the softmax, fully masked rows included."""

from __future__ import annotations

import itertools

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.expr import k, q, s
from attnopt.patterns.masks import Masked, absorbed, split
from attnopt.spec import EmptyRow

MIN = ex.number(torch.finfo(torch.float32).min)
KEPT, FIRST = sp.Ge(q - k, 0), sp.Ge(q, 1)
NO = ex.NEG_INF
LOGITS = (
    ("infinite", ex.Where(KEPT, s, NO), EmptyRow.NAN, True),
    ("filled", ex.Where(sp.Not(KEPT), NO, s), EmptyRow.NAN, True),
    ("added", s + ex.Where(KEPT, sp.S.Zero, NO), EmptyRow.NAN, True),
    ("empty_rows", ex.Where(FIRST, s, NO), EmptyRow.NAN, True),
    ("two_infinite", s + ex.Where(KEPT, sp.S.Zero, NO) + ex.Where(FIRST, sp.S.Zero, NO), EmptyRow.NAN, True),
    ("nested", ex.Where(KEPT, ex.Where(FIRST, s, NO), NO), EmptyRow.NAN, True),
    ("scaled", 2 * ex.Where(KEPT, s, NO), EmptyRow.NAN, True),
    ("minimum", ex.Where(FIRST, s, MIN), EmptyRow.UNIFORM, True),
    ("minimum_added", s + ex.Where(FIRST, sp.S.Zero, MIN), EmptyRow.UNIFORM, True),
    ("minimum_nested", ex.Where(KEPT, ex.Where(FIRST, s, MIN), MIN), EmptyRow.UNIFORM, True),
    ("two_minima", s + ex.Where(KEPT, sp.S.Zero, MIN) + ex.Where(FIRST, sp.S.Zero, MIN), EmptyRow.NAN, False),
    ("ten_thousand", s + ex.Where(FIRST, sp.S.Zero, sp.Integer(-10000)), EmptyRow.NAN, False),
    ("both", ex.Where(KEPT, ex.Where(FIRST, s, MIN), NO), EmptyRow.NAN, True),
)  # fmt: skip


def _logits(expr: sp.Basic, scores: torch.Tensor) -> torch.Tensor:
    out = torch.empty(4, 4, dtype=torch.float64)
    for i, j in itertools.product(range(4), range(4)):
        out[i, j] = float(_number(expr, {q: sp.Integer(i), k: sp.Integer(j), s: ex.number(scores[i, j].item())}))
    return out.float()


def _number(expr: sp.Basic, at: dict[sp.Basic, sp.Basic]) -> sp.Basic:
    return at.get(expr) or (
        expr.func(*[_number(a, at) for a in expr.args]) if expr.args and expr not in at else at.get(expr, expr)
    )


@pytest.mark.parametrize(("name", "logit", "empty", "masked"), LOGITS, ids=[x[0] for x in LOGITS])
def test_rows_are_those_of_the_dense_softmax(name: str, logit: sp.Expr, empty: EmptyRow, masked: bool) -> None:
    found = split(logit)
    assert found.empty_row is empty
    assert (found.keep != sp.true) == masked
    _agrees(found, logit)


def _agrees(found: Masked, logit: sp.Expr) -> None:
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    want = _logits(logit, scores).softmax(-1)
    kept = torch.tensor(
        [[bool(_number(found.keep, {q: sp.Integer(i), k: sp.Integer(j)})) for j in range(4)] for i in range(4)]
    )
    got = _logits(found.score, scores).masked_fill(~kept, -torch.inf).softmax(-1)
    bare = ~kept.any(-1)
    fill = {EmptyRow.NAN: torch.nan, EmptyRow.ZERO: 0.0, EmptyRow.UNIFORM: 0.25}[found.empty_row]
    got[bare] = fill
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("other", [FIRST, sp.And(KEPT, FIRST), sp.Ge(k - q, 0)], ids=str)
def test_two_minima_that_overflow_drop_for_good_what_both_drop(other: sp.Basic) -> None:
    logit = ex.Where(KEPT, s, MIN) + ex.Where(other, sp.S.Zero, MIN)
    found = split(logit, limit=torch.finfo(torch.float32).max)
    assert found.keep == ex.canon(sp.Or(KEPT, other))
    assert found.empty_row is EmptyRow.NAN
    _agrees(found, logit)
    assert split(logit, limit=torch.finfo(torch.float64).max).keep == sp.true


ABSORBED = (
    ("minimum", torch.float16, -65504.0, 32),
    ("ten_thousand", torch.float16, -10000.0, 8),
    ("ten_thousand", torch.bfloat16, -10000.0, 64),
    ("billion", torch.bfloat16, -1e9, 2**22),
)


@pytest.mark.parametrize(("name", "dtype", "fill", "unit"), ABSORBED, ids=[f"{a[0]}_{str(a[1])[6:]}" for a in ABSORBED])
def test_a_fill_in_sixteen_bits_rounds_the_score(name: str, dtype: torch.dtype, fill: float, unit: int) -> None:
    value = ex.number(torch.tensor(fill, dtype=dtype).item())
    found = absorbed(s + ex.Where(KEPT, sp.S.Zero, value), torch.finfo(dtype).eps)
    assert found == ex.Where(KEPT, s, ex.Snap(s, sp.Integer(unit)) + value)
    for score in (0.3, 11.0, -14.0, 40.0):
        added = torch.tensor(score, dtype=dtype) + torch.tensor(fill, dtype=dtype)
        if added.isfinite() and -added < 2 ** int(-value).bit_length():  # else the sum is of the next binade
            assert float(ex.Snap(ex.number(score), sp.Integer(unit)) + value) == added.item()


PLAIN = (
    s + ex.Where(KEPT, sp.S.Zero, MIN),
    s + ex.Where(KEPT, sp.S.Zero, NO),
    s + ex.Where(KEPT, sp.S.Zero, sp.Integer(-100)),
    s + ex.Where(KEPT, sp.S.One, sp.Integer(-10000)),
    ex.Where(KEPT, s, sp.Integer(-10000)),
)


@pytest.mark.parametrize("logit", PLAIN, ids=str)
def test_other_fills_stay(logit: sp.Expr) -> None:
    assert absorbed(logit, 2**-10) == logit


def test_a_fill_that_is_written_as_a_product_is_seen() -> None:
    value, kept = sp.Integer(-65504), ex.Where(KEPT, sp.S.One, sp.S.Zero)
    assert absorbed(s + (1 - kept) * value, 2**-10) == ex.Where(KEPT, s, ex.Snap(s, sp.Integer(32)) + value)
