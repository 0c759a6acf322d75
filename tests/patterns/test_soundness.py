"""A region from outside is looked at before it is believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.errors import Decline
from attnopt.patterns import find
from attnopt.patterns.soundness import sound
from attnopt.region import Region
from tests.modules import captured

QUERIES, KEYS = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)


def _regions() -> list[Region]:
    """Regions of many layouts that attnopt's own patterns made."""
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    grouped = torch.nn.functional.scaled_dot_product_attention
    runs: tuple[tuple[Any, ...], ...] = (
        (lambda q, k, m: grouped(q, k, k, m, enable_gqa=True), QUERIES, KEYS, mask),
        (lambda q, k: (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ k.repeat_interleave(2, 1), QUERIES, KEYS),
        (lambda q: (q @ q.mT).softmax(-1) @ q, torch.randn(5, 8)),
        (lambda q: (q.flatten(0, 1) @ q.flatten(0, 1).mT).softmax(-1) @ q.flatten(0, 1), QUERIES),
        (lambda q: (q[:, :1] @ q.mT).softmax(-1) @ q, QUERIES),
        (lambda q: torch.einsum("bqkh,bkhd->bqhd", torch.einsum("bqhd,bkhd->bqkh", q, q).softmax(2), q), QUERIES),
    )
    found = [find(captured(run, *inputs).gm.graph)[0][2] for run, *inputs in runs]
    assert all(isinstance(r, Region) for r in found), found
    return found  # type: ignore[return-value]


def test_what_the_engine_makes_is_sound() -> None:
    for region in _regions():
        assert sound(region, "own", region.anchor) is region


@pytest.mark.parametrize("given", [None, Decline("no")])
def test_none_and_declines_pass(given: Any) -> None:
    assert sound(given, "mine", None) is given


@pytest.mark.parametrize("given", [3, "a region", (1, 2), Region])
def test_anything_else_is_a_decline_that_names_the_pattern(given: Any) -> None:
    found = sound(given, "mine", "node")
    assert isinstance(found, Decline)
    assert "pattern 'mine' gave" in found.reason


def test_a_field_that_is_missing_is_a_decline_too() -> None:
    region = _regions()[0]
    for name in ("query", "spec", "captures", "out_dims", "batch"):
        found = sound(region.replace(**{name: None}), "mine", region.anchor)
        assert isinstance(found, Decline), name
        assert "does not fit" in found.reason
