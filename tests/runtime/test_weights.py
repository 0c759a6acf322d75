"""Normalised weights against softmax, and what rows without keys have."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from attnopt.runtime.weights import filled_weights, weights
from attnopt.spec import EmptyRow
from tests.runtime.cases import inputs, padded

F64 = torch.float64


@pytest.mark.parametrize("policy", list(EmptyRow))
def test_weights_are_a_softmax_over_kept_keys(policy: EmptyRow) -> None:
    spec = padded(policy)
    q, k, _ = inputs(spec, dtype=F64)
    pad = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    want = torch.einsum("bhqd,bhkd->bhqk", q, k).div(3)[:1].masked_fill(~pad[0], -torch.inf).softmax(-1)
    found, kept, scores = weights(spec, q, k, [pad])
    assert_close(found[:1], want)
    assert bool((found[1] == 0).all())
    assert kept.sum().item() == 4 * 5 * 4
    assert scores.shape == found.shape
    filled = filled_weights(spec, q, k, [pad])
    fill = {EmptyRow.ZERO: 0.0, EmptyRow.NAN: torch.nan, EmptyRow.UNIFORM: 1 / 7}[policy]
    assert_close(filled[:1], want)
    assert_close(filled[1], torch.full((4, 5, 7), fill, dtype=F64), equal_nan=True)


def test_no_keys_are_no_weights() -> None:
    spec = padded(EmptyRow.NAN)
    q, k, _ = inputs(spec)
    assert filled_weights(spec, q, k[:, :, :0], [torch.ones(2, 0, dtype=torch.bool)]).shape == (2, 4, 5, 0)
