"""Derivatives against differences of the reference's own evaluation."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.codegen.derivative import derivative
from attnopt.errors import SpecError
from attnopt.runtime.evaluate import Scope, evaluate

_S = ex.s
EXPRESSIONS = (
    3 * _S + ex.q, _S**2 * ex.k, sp.exp(-_S) / 4, sp.log(2 + _S**2), 30 * sp.tanh(_S / 30), sp.sin(_S) * sp.cos(2 * _S),
    sp.erf(_S), sp.Abs(_S) * _S, ex.Maximum(_S, ex.Minimum(2 * _S, 1)), ex.Where(ex.k <= ex.q, _S**3, -_S), 1 / (1 + sp.exp(-_S)),
    sp.sqrt(1 + _S**2), ex.Trunc(_S) + sp.floor(_S) + sp.sign(_S) + _S,
)  # fmt: skip


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_it_is_what_pytorch_finds(expr: sp.Expr) -> None:
    s = torch.linspace(-2.9, 2.9, 12, dtype=torch.float64).view(1, 1, 3, 4).requires_grad_()
    axes = {c: torch.arange(n) for c, n in zip(ex.COORDINATES, (1, 1, 3, 4), strict=True)}
    (expected,) = torch.autograd.grad(evaluate(expr, Scope(axes, {}, {}, s, torch.float64)).sum(), s)
    found = evaluate(derivative(expr, ex.s), Scope(axes, {}, {}, s.detach(), torch.float64))
    torch.testing.assert_close(found.to(torch.float64).expand_as(expected), expected)


def test_by_a_load() -> None:
    load = ex.load("x", ex.h)
    assert derivative(ex.s + load * (ex.k - ex.q), load) == ex.k - ex.q
    assert derivative(ex.s, load) == 0
    assert derivative(ex.load("y", ex.q), load) == 0


def test_what_has_no_rule_is_said() -> None:
    with pytest.raises(SpecError, match="no rule"):
        derivative(ex.Mod(ex.s, 3), ex.s)
    with pytest.raises(SpecError, match="no rule"):
        derivative(sp.Pow(2, ex.s), ex.s)
