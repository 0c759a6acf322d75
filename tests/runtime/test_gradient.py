"""Gradients inside an operator, below the autograd keys."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from attnopt.runtime.gradient import gradients
from attnopt.runtime.reference import reference
from tests.runtime.cases import BIASED, PLAIN, inputs

F64 = torch.float64


def test_below_autograd_and_under_autocast_they_are_still_recorded() -> None:
    q, k, v = inputs(BIASED, dtype=F64)
    bias = torch.randn(4, 5, 7, dtype=F64)
    weight = torch.randn(2, 4, 5, 6, dtype=F64)
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(BIASED, weight, None, (q, k, v, bias), (), [True] * 4)
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    want = torch.autograd.grad((reference(BIASED, q, k, v, [bias])[0] * weight).sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("needs", [(True, False, False), (False, False, True), (False, False, False)])
def test_only_what_is_needed(needs: tuple[bool, ...]) -> None:
    q, k, v = inputs(PLAIN)
    assert len(gradients(PLAIN, torch.ones(2, 4, 5, 6), None, (q, k, v), (), needs)) == sum(needs)


def test_without_keys_gradients_are_zero() -> None:
    q, k, v = inputs(PLAIN, n_k=0)
    found = gradients(PLAIN, torch.ones(2, 4, 5, 6), None, (q, k, v), (), [False, False, True])
    assert found[0].shape == v.shape
