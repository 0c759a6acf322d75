"""Masks are taken out of weights only where they vanish; sums are told from one another."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.patterns.rows import nonnegative, peel, quotient, vanishes

C = sp.Ge(ex.q - ex.k, 0)
B = ex.load("bias", ex.q, ex.k)
LOWEST = -(sp.Integer(10) ** 38)


def where(x: sp.Expr, fill: sp.Expr) -> sp.Expr:
    return ex.Where(C, x, fill)


def sigmoid(x: sp.Expr) -> sp.Expr:
    return 1 / (1 + sp.exp(-x))


PEELED = (
    (where(ex.s, sp.S.Zero), ex.s, C),
    (ex.Where(C, sp.S.Zero, ex.s), ex.s, sp.Not(C)),
    (sigmoid(where(ex.s, ex.NEG_INF)), sigmoid(ex.s), C),
    (sigmoid(ex.s + where(sp.S.Zero, ex.NEG_INF)), sigmoid(ex.s), C),
    (sigmoid(where(ex.s, LOWEST)), sigmoid(ex.s), C),
    (sigmoid(where(ex.s, ex.NEG_INF) + B), sigmoid(ex.s + B), C),
    (ex.Maximum(where(ex.s, ex.NEG_INF), sp.S.Zero), ex.Maximum(ex.s, sp.S.Zero), C),
    (ex.s * ex.Where(C, sp.S.One, sp.S.Zero), ex.s, C),
    (sp.tanh(where(ex.s, sp.S.Zero)), sp.tanh(ex.s), C),
)


@pytest.mark.parametrize(("weights", "score", "keep"), PEELED, ids=str)
def test_a_mask_that_makes_weights_vanish_is_taken_out(weights: sp.Expr, score: sp.Expr, keep: sp.Basic) -> None:
    assert peel(weights) == (score, ex.canon(keep))


STAY = (
    sp.tanh(where(ex.s, ex.NEG_INF)),  # minus one, not zero
    sigmoid(where(ex.s, -(sp.Integer(10) ** 4))),  # small, not zero, and it depends on the score
    sigmoid(where(ex.s, sp.S.Zero)),  # a half
    sp.exp(where(ex.s, B)),
    ex.Where(sp.Gt(ex.s, 0), ex.s, sp.S.Zero),  # a comparison of scores is no mask
)


@pytest.mark.parametrize("weights", STAY, ids=str)
def test_what_does_not_vanish_stays(weights: sp.Expr) -> None:
    assert peel(weights) == (weights, sp.true)


def test_infinities_are_followed_to_their_limit() -> None:
    assert vanishes(sigmoid(ex.NEG_INF + B))
    assert not vanishes(sigmoid(sp.oo))
    assert not vanishes(B)


def test_exponentials_of_loads_cancel() -> None:
    assert quotient(sp.exp(ex.s - B) * sp.sign(ex.s), sp.exp(ex.s - B)) == sp.sign(ex.s)
    assert quotient(ex.s, sp.exp(B)) == ex.s * sp.exp(-B)


@pytest.mark.parametrize(
    ("weights", "known"),
    [(sigmoid(ex.s), True), (ex.Maximum(ex.s, sp.S.Zero), True), (ex.s**2, True), (sp.log(1 + sp.exp(ex.s)), True),
     (where(sp.Abs(B), sp.exp(ex.s)), True), (ex.s, False), (sp.tanh(ex.s), False), (B, False)],
    ids=str,
)  # fmt: skip
def test_weights_that_cannot_be_negative_are_known(weights: sp.Expr, known: bool) -> None:
    assert nonnegative(weights) == known
