"""Column mass and weights by their definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from attnopt.runtime import pairs
from attnopt.runtime.pairs import defined, economical, side_gradients
from tests.runtime.cases import CAUSAL, inputs

F64 = torch.float64


def test_columns_are_sums_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs(CAUSAL, dtype=F64)
    p = defined(CAUSAL, q, k, (), (), "weights")
    assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    assert_close(defined(CAUSAL, q, k, (), (), "column_mass"), p.sum(-2))
    monkeypatch.setattr(pairs, "_AT_ONCE", 2 * q.shape[0] * q.shape[1] * k.shape[2])  # two rows at a time
    assert_close(economical(CAUSAL, q, k, (), (), "column_mass"), p.sum(-2))
    assert torch.equal(economical(CAUSAL, q, k, (), (), "weights"), p)


def test_gradients_are_those_of_the_definition() -> None:
    q, k, _ = inputs(CAUSAL, dtype=F64)
    grad = torch.randn(q.shape[0], q.shape[1], k.shape[2], dtype=F64)
    found = side_gradients(CAUSAL, grad, (q, k), (), "column_mass", (True, True))
    leaves = [t.clone().requires_grad_() for t in (q, k)]
    want = torch.autograd.grad(defined(CAUSAL, *leaves, (), (), "column_mass"), leaves, grad)
    assert_close(found, list(want))
    assert side_gradients(CAUSAL, grad, (q, k), (), "column_mass", (False, False)) == []
