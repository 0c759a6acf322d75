"""The functions of a spec's expressions: what they evaluate, and in which order terms are added."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt import functions
from attnopt.errors import SpecError
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Capture, Heads

MASK, BIAS = ex.load("mask", ex.b, ex.k, integer=True), ex.load("bias", ex.h, ex.k)


def test_numbers_are_evaluated_at_once() -> None:
    assert functions.FloorDiv(sp.Integer(-7), sp.Integer(2)) == -4
    assert functions.Mod(sp.Integer(-7), sp.Integer(2)) == 1
    assert functions.Maximum(sp.Integer(2), sp.Integer(5)) == 5
    assert functions.Where(sp.true, ex.s, ex.q) == ex.s
    assert functions.Trunc(ex.k) == ex.k


def test_expr_gives_the_same_objects() -> None:
    assert all(getattr(ex, name) is getattr(functions, name) for name in ("Load", "Where", "s", "t", "a", "truth"))


def test_a_capture_has_the_name_of_a_variable() -> None:
    with pytest.raises(SpecError, match="identifier"):
        functions.load("no name", ex.q)


def test_truth_sees_through_a_choice_of_numbers() -> None:
    test = sp.Ge(ex.q - ex.k, 0)
    assert functions.truth(functions.Where(test, sp.S.One, sp.S.Zero)) == test
    assert functions.truth(functions.Where(test, sp.S.Zero, sp.S.One)) == sp.Not(test)
    assert functions.as_number(test) == functions.Where(test, sp.S.One, sp.S.Zero)


def test_terms_that_balance_are_added_before_those_they_would_absorb() -> None:
    order = functions.sides(ex.s / 4 + BIAS + 10000 * MASK - 10000)
    assert set(order[:2]) == {10000 * MASK, sp.Integer(-10000)}
    assert order[2:] == (BIAS, ex.s / 4)


@pytest.mark.parametrize("fill", [10000.0, 1e30], ids=str)
def test_a_mask_that_balances_costs_no_digits(fill: float) -> None:
    huge = ex.number(fill)
    captures = (Capture("mask", "int", (None, None)), Capture("bias", "float", (None, None)))
    spec = AttentionSpec(Heads(2, 2, 2, 4, 4), score=ex.s + BIAS + huge * MASK - huge, captures=captures)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator) for n in (3, 6, 6))
    bias, mask = torch.randn(2, 6, generator=generator), torch.tensor([[1, 1, 1, 1, 0, 0]])
    scores = q.double() @ k.double().mT + bias.double()[None, :, None]
    golden = scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(-1) @ v.double()
    torch.testing.assert_close(reference(spec, q, k, v, [mask, bias])[0].double(), golden, rtol=1e-5, atol=1e-6)


def test_a_number_snaps_to_the_nearest_multiple() -> None:
    assert functions.Snap(sp.Rational(7, 2), sp.Integer(4)) == 4
    assert functions.Snap(sp.Integer(-14), sp.Integer(32)) == 0
    assert sp.diff(functions.Snap(3 * ex.s, sp.Integer(4)), ex.s) == 3
    assert ex.from_tree(ex.to_tree(functions.Snap(ex.s, sp.Integer(4)))) == functions.Snap(ex.s, sp.Integer(4))
