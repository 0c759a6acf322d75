"""Softmaxes written by hand: logarithms of exponentials, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.patterns import find
from attnopt.patterns.byhand import log
from tests.modules import captured

INPUTS = (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8))
M, A = sp.Ne(ex.load("mask", ex.k, integer=True), 0), ex.load("a", ex.k)
LOGARITHMS = (
    (sp.exp(ex.s), ex.s),
    (ex.Where(M, sp.exp(ex.s), sp.S.Zero), ex.Where(M, ex.s, ex.NEG_INF)),
    (ex.Where(M, sp.S.One, sp.S.Zero) * sp.exp(ex.s), ex.Where(M, ex.s, ex.NEG_INF)),
    (2 * sp.exp(ex.s), ex.s + sp.log(2)),
    (1 + sp.exp(A), sp.log(1 + sp.exp(A))),
    (A, None), (A * sp.exp(ex.s), None), (sp.Integer(-1), None), (1 + A, None), (ex.s, None),
)  # fmt: skip


@pytest.mark.parametrize(("expr", "expected"), LOGARITHMS, ids=[str(e) for e, _ in LOGARITHMS])
def test_logarithms(expr: sp.Expr, expected: sp.Expr | None) -> None:
    assert log(expr, {}) == expected


def _over(exps: Tensor, total: Tensor, v: Tensor) -> Tensor:
    return exps / total @ v


LEFT: tuple[tuple[str, Callable[..., Tensor]], ...] = (
    ("sum_of_others", lambda q, k, v: _over((q @ k.mT).exp(), (q @ k.mT / 2).exp().sum(-1, keepdim=True), v)),
    ("over_queries", lambda q, k, v: _over((q @ k.mT).exp(), (q @ k.mT).exp().sum(-2, keepdim=True), v)),
    ("clamped", lambda q, k, v: _over((q @ k.mT).exp(), (q @ k.mT).exp().sum(-1, keepdim=True).clamp_min(1e-6), v)),
    ("shift_of_others", lambda q, k, v: _over((q @ k.mT - (q @ k.mT * 2).amax(-1, keepdim=True)).exp(), (q @ k.mT).exp().sum(-1, keepdim=True), v)),
    ("epsilon_beside_a_maximum", lambda q, k, v: (lambda e: _over(e, e.sum(-1, keepdim=True) + 1e-6, v))((q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp())),
    ("features", lambda q, k, v: (q.exp() / q.exp().sum(-1, keepdim=True)) @ (k.mT @ v)),
)  # fmt: skip


@pytest.mark.parametrize(("name", "run"), LEFT, ids=[name for name, _ in LEFT])
def test_what_is_no_softmax_of_its_row_is_not_taken_for_one(name: str, run: Callable[..., Tensor]) -> None:
    assert "softmax by hand" not in [pattern for _, pattern, _ in find(captured(run, *INPUTS).gm.graph)]


def test_an_epsilon_without_a_maximum_is_a_sink() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exps = (q @ k.mT).exp()
        return _over(exps, exps.sum(-1, keepdim=True) + 0.5, v)

    ((_, pattern, region),) = find(captured(run, *INPUTS).gm.graph)
    assert pattern == "softmax by hand"
    assert str(region.spec) == "4 heads, d=8; score s; sink -log(2)"  # type: ignore[union-attr]
