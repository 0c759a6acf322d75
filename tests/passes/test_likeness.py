"""Plans: what is measured, what is grouped, what may be rotated, and why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.errors import Decline
from attnopt.passes.align import Freedom, distances
from attnopt.passes.likeness import Alignment, align, moments
from attnopt.passes.stage import Stage
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from tests.passes.test_head_paths import Rotary, half_split
from tests.passes.tiny import HEADS, INNER, WIDTH, model, stage


def _site(module: nn.Module, x: Tensor) -> tuple[Stage, Any, Projections]:
    at = stage(module.double().eval(), x)
    (region,) = at.regions.values()
    found = projections.find(region)
    assert isinstance(found, Projections), str(found)
    return at, region, found


def _plan(module: nn.Module, x: Tensor, count: int = 2) -> Alignment | Decline:
    at, region, found = _site(module, x)
    seen = moments(at, {"": (region, found)})[""]
    return align(at, region, found, count, seen, movable=True)


@pytest.mark.parametrize("layout", ["separate", "interleaved", "conv"])
def test_moments_are_those_of_the_projections(layout: str) -> None:
    module, x = model(layout)
    at, region, found = _site(module, x)
    seen = moments(at, {"a": (region, found)})["a"]
    _, k, v = module.heads(x)
    for heads, total in ((k, seen.k), (v, seen.v)):
        flat = heads.transpose(1, 2).reshape(-1, INNER)
        torch.testing.assert_close(total, flat.t() @ flat, rtol=1e-10, atol=1e-10)


def test_a_head_and_its_rotated_copy_are_one_group() -> None:
    """Head 3 is head 0 and head 2 is head 1, values rotated at will, keys within the planes of RoPE."""
    torch.manual_seed(0)
    module, x = Rotary(half_split).double(), torch.randn(2, 9, INNER, dtype=torch.float64)
    angle = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
    turn = torch.cat(
        [
            torch.cat([angle.cos().diag(), angle.sin().diag()], 1),
            torch.cat([-angle.sin().diag(), angle.cos().diag()], 1),
        ]
    )
    free = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))[0]
    with torch.no_grad():
        for p, q in ((module.k, turn), (module.v, free)):
            for here, there in ((0, 3), (1, 2)):
                rows = [slice(h * WIDTH, (h + 1) * WIDTH) for h in (here, there)]
                p.weight[rows[1]], p.bias[rows[1]] = q @ p.weight[rows[0]], q @ p.bias[rows[0]]
    plan = _plan(module, x)
    assert isinstance(plan, Alignment)
    assert plan.groups.members == ((0, 3), (1, 2))
    assert plan.groups.moved
    assert plan.remarks == ()
    assert plan.turns is not None
    torch.testing.assert_close(plan.turns.k[3], turn, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(plan.turns.v[2], free, rtol=1e-8, atol=1e-8)


def test_a_norm_that_does_not_commute_keeps_keys_as_they_are_and_says_so() -> None:
    torch.manual_seed(0)
    gains = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
    module = Rotary(lambda t: half_split(nn.functional.rms_norm(t, (WIDTH,)) * gains))
    plan = _plan(module, torch.randn(2, 9, INNER, dtype=torch.float64))
    assert isinstance(plan, Alignment)
    assert plan.turns is not None
    assert torch.equal(plan.turns.k, torch.eye(WIDTH, dtype=torch.float64).repeat(HEADS, 1, 1))
    assert not torch.equal(plan.turns.v, plan.turns.k)
    assert len(plan.remarks) == 1
    assert "key heads are grouped but not rotated" in plan.remarks[0]


def test_one_position_proves_nothing_about_others() -> None:
    """At the first position RoPE turns nothing, so that every rotation would seem to pass."""
    torch.manual_seed(0)
    plan = _plan(Rotary(half_split), torch.randn(3, 1, INNER, dtype=torch.float64))
    assert isinstance(plan, Alignment)
    assert plan.turns is not None
    assert torch.equal(plan.turns.k, torch.eye(WIDTH, dtype=torch.float64).repeat(HEADS, 1, 1))


def test_heads_that_differ_behind_their_projection_are_left_alone() -> None:
    gains = torch.arange(1.0, HEADS + 1, dtype=torch.float64)[:, None, None]
    plan = _plan(Rotary(lambda t: t * gains), torch.randn(2, 5, INNER, dtype=torch.float64))
    assert isinstance(plan, Decline)
    assert "key heads differ" in str(plan)


def test_a_gain_of_heads_behind_attention_keeps_them_in_their_places() -> None:
    gains = torch.arange(1.0, HEADS + 1, dtype=torch.float64)[:, None, None]
    plan = _plan(Rotary(lambda t: t, after=lambda t: t * gains), torch.randn(2, 5, INNER, dtype=torch.float64))
    assert isinstance(plan, Alignment)
    assert not plan.groups.moved
    assert plan.turns is not None
    assert torch.equal(plan.turns.v, torch.eye(WIDTH, dtype=torch.float64).repeat(HEADS, 1, 1))


def test_groups_are_chosen_by_keys_and_values_together() -> None:
    module, x = model("separate")
    at, region, found = _site(module, x)
    seen = moments(at, {"": (region, found)})[""]
    plan = align(at, region, found, 2, seen, movable=True)
    assert isinstance(plan, Alignment)
    free = Freedom(free=(tuple(range(WIDTH)),))
    cost = distances(seen.k, HEADS, free) + distances(seen.v, HEADS, free)
    pairs = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    assert plan.groups.members == min(pairs, key=lambda groups: sum(float(cost[i, j]) for i, j in groups))
