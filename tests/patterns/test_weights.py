"""What is read of weights that are changed, and when a mask on them says nothing new."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked
from attnopt.patterns.ops import Filled, Missing
from attnopt.patterns.weights import P, Weights, guarded, never_empty, read, settle
from attnopt.spec import EmptyRow

M = sp.Ne(ex.load("mask", ex.b, ex.k, integer=True), 0)
OTHER = sp.Ne(ex.load("other", ex.b, ex.k, integer=True), 0)
GAIN = ex.load("gain", ex.h)
CAUSAL = ex.canon(sp.Le(ex.k, ex.q))
ZERO, ONE = sp.S.Zero, sp.S.One
LIFTER = Lifter(Sizes({ex.k: sp.Integer(9)}))

READ = (
    (P, Weights(ONE)),
    (2 * GAIN * P, Weights(2 * GAIN)),
    (ex.Where(M, P, ZERO), Weights(ONE, (M,))),
    (ex.Where(M, ZERO, P * GAIN), Weights(GAIN, (sp.Not(M),))),
    (ex.Where(M, P, 2 * P), Weights(ex.Where(M, ONE, sp.Integer(2)))),
    (ex.Where(Missing(P), ZERO, P), Weights(ONE, filled=True)),
    (ex.Where(sp.Not(Missing(P)), P, ZERO), Weights(ONE, filled=True)),
    (Filled(P, ZERO), Weights(ONE, filled=True)),
    (P * GAIN + P, Weights(GAIN + 1)),
    (P + 1, None), (P**2, None), (sp.exp(P), None), (ex.Where(M, P, ONE), None), (Filled(P, ONE), None),
    (Filled(P * GAIN, ZERO), None), (ex.Where(sp.Gt(P, 0), P, ZERO), None), (ex.Where(Missing(P), ONE, P), None),
)  # fmt: skip


@pytest.mark.parametrize(("expr", "expected"), READ, ids=[str(e) for e, _ in READ])
def test_reading(expr: sp.Expr, expected: Weights | None) -> None:
    assert read(expr) == expected


def _settled(found: Weights, keep: sp.Basic, row: EmptyRow) -> object:
    result = settle(found, Masked(ex.s, keep, row), LIFTER)
    return result if isinstance(result, str) else (result[0].empty_row, result[1])


FACTOR = ex.canon(ex.Where(OTHER, ONE, ZERO))
OWN = ex.canon(ex.Where(M, ONE, ZERO))
SETTLED = (
    (Weights(ONE, (M,)), M, EmptyRow.NAN, (EmptyRow.ZERO, ONE)),
    (Weights(ONE, (M,)), M, EmptyRow.UNIFORM, (EmptyRow.ZERO, ONE)),
    (Weights(OWN), M, EmptyRow.NAN, (EmptyRow.NAN, ONE)),
    (Weights(OWN), M, EmptyRow.UNIFORM, (EmptyRow.ZERO, ONE)),
    (Weights(ONE, filled=True), M, EmptyRow.NAN, (EmptyRow.ZERO, ONE)),
    (Weights(ONE, filled=True), M, EmptyRow.UNIFORM, (EmptyRow.UNIFORM, ONE)),
    (Weights(GAIN, (M,)), sp.And(M, OTHER), EmptyRow.UNIFORM, (EmptyRow.UNIFORM, ex.canon(GAIN * OWN))),
    (Weights(ONE, (OTHER,)), sp.true, EmptyRow.NAN, (EmptyRow.NAN, FACTOR)),
    (Weights(ONE, (OTHER,)), CAUSAL, EmptyRow.NAN, (EmptyRow.NAN, FACTOR)),
    (Weights(ONE, (M,)), sp.And(M, CAUSAL), EmptyRow.ZERO, (EmptyRow.ZERO, ONE)),
)  # fmt: skip


@pytest.mark.parametrize(("found", "keep", "row", "expected"), SETTLED, ids=range(len(SETTLED)))
def test_settling(found: Weights, keep: sp.Basic, row: EmptyRow, expected: object) -> None:
    assert _settled(found, keep, row) == expected


@pytest.mark.parametrize("keep", [M, sp.And(M, OTHER)])
def test_a_mask_that_is_not_the_scores_own_is_refused_where_rows_may_be_nan(keep: sp.Basic) -> None:
    """The row of another mask is zero where the source has a product of zero and NaN."""
    test = OTHER if keep == M else M
    assert "empty rows are NaN" in str(_settled(Weights(ONE, (test,)), keep, EmptyRow.NAN))


def test_rows_that_keep_a_key_for_certain() -> None:
    assert never_empty(CAUSAL)
    assert never_empty(sp.true)
    assert not never_empty(M)


def test_a_logit_without_guard_is_split_as_ever() -> None:
    found = guarded(ex.Where(M, ex.s, ex.NEG_INF), LIFTER)
    assert (found.score, found.empty_row) == (ex.s, EmptyRow.NAN)
