"""Operands are walked back through views and constant factors, and no further."""

from __future__ import annotations

import torch

from tests.patterns.test_site import K, Q, region


def test_factors_join_the_score() -> None:
    found = region(lambda q, k: ((q * 0.5) @ (k / 4).mT).softmax(-1) @ k, Q, K)
    assert str(found.spec) == "4 heads, d=8; score s/8"
    assert [o.node.op for o in (found.query, found.key, found.value)] == ["placeholder"] * 3


def test_a_part_of_a_longer_tensor_is_not_taken_for_the_whole() -> None:
    found = region(lambda q, k: (q @ k[:, :, 1:].mT).softmax(-1) @ k[:, :, 1:], Q, K)
    assert found.key.node.op == "call_function"


def test_a_tensor_factor_stays_outside() -> None:
    found = region(lambda q, k, w: ((q * w) @ k.mT).softmax(-1) @ k, Q, K, torch.ones(8))
    assert found.query.node.op == "call_function"
