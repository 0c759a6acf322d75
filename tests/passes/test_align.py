"""Heads that are rotations of one another are found, grouped and turned back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attnopt.passes.align import Freedom, distances, grouped, nearest, rotations

D = 6
FREE = Freedom(free=(tuple(range(D)),))
PLANES = Freedom(planes=((0, 3), (1, 4)), free=((2, 5),))


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _moments(heads: list[Tensor]) -> Tensor:
    x = torch.cat(heads, -1)
    return x.t() @ x


def _allowed(q: Tensor, freedom: Freedom) -> bool:
    """Whether a matrix is orthogonal, turns planes without reflecting them, and leaves what is not free."""
    left = q.clone()
    for a, b in freedom.planes:
        if abs(q[a, a] - q[b, b]) + abs(q[a, b] + q[b, a]) > 1e-9:
            return False
        left[[a, a, b, b], [a, b, a, b]] = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=q.dtype)
    for free in freedom.free:
        at = torch.tensor(free)
        left[at[:, None], at] = torch.eye(len(free), dtype=q.dtype)
    eye = torch.eye(len(q), dtype=q.dtype)
    return torch.equal(left, eye) and bool((q @ q.t() - eye).abs().max() < 1e-9)


@pytest.mark.parametrize("freedom", [FREE, PLANES, Freedom()])
def test_the_nearest_rotation_is_allowed_and_the_best(freedom: Freedom) -> None:
    c = _draw(0, D, D)
    best = nearest(c, freedom)
    assert _allowed(best, freedom)
    for seed in range(20):
        other = nearest(_draw(seed + 1, D, D), freedom)
        assert _allowed(other, freedom)
        assert (other * c).sum() <= (best * c).sum() + 1e-12
    assert freedom.size == {FREE: D, PLANES: D}.get(freedom, 0)


@pytest.mark.parametrize("freedom", [FREE, PLANES])
def test_rotated_copies_are_grouped_and_turned_onto_one_another(freedom: Freedom) -> None:
    """Heads 0, 3 and 1, 2 are rotated copies of one another."""
    a, b = _draw(1, 40, D), _draw(2, 40, D)
    turn, other = (nearest(_draw(s, D, D), freedom) for s in (3, 4))
    heads = [a, b, b @ other, a @ turn]
    moments = _moments(heads)
    cost = distances(moments, 4, freedom)
    assert torch.allclose(cost, cost.t(), atol=1e-12)
    assert cost[0, 3] < 1e-12
    assert cost[1, 2] < 1e-12
    assert cost[0, 1] > 0.1
    groups = grouped(cost, 2)
    assert groups == ((0, 3), (1, 2))
    q = rotations(moments, 4, groups, freedom)
    assert all(_allowed(x, freedom) for x in q)
    assert torch.allclose(heads[3] @ q[3], a @ q[0], atol=1e-9)
    assert torch.allclose(heads[2] @ q[2], b @ q[1], atol=1e-9)
    assert torch.equal(q[0], torch.eye(D, dtype=torch.float64))


def test_what_may_not_be_rotated_is_compared_as_it_is() -> None:
    a = _draw(1, 40, D)
    cost = distances(_moments([a, a @ nearest(_draw(3, D, D), FREE)]), 2, Freedom())
    whole = torch.cat([a, a]).square().sum()
    assert cost[0, 1] > 0.1
    assert torch.equal(
        rotations(_moments([a, -a]), 2, ((0, 1),), Freedom()), torch.eye(D, dtype=torch.float64).repeat(2, 1, 1)
    )
    assert distances(_moments([a, -a]), 2, Freedom())[0, 1] == pytest.approx(float(4 * a.square().sum() / whole))


def test_groups_are_the_best_of_all() -> None:
    cost = _draw(5, 6, 6).abs()
    cost = cost + cost.t()

    def inside(groups: tuple[tuple[int, ...], ...]) -> float:
        return sum(float(cost[i, j]) for g in groups for i, j in itertools.combinations(g, 2))

    everyway = [
        ((0, *first), tuple(h for h in range(1, 6) if h not in first))
        for first in itertools.combinations(range(1, 6), 2)
    ]
    assert inside(grouped(cost, 2)) == pytest.approx(min(map(inside, everyway)))
    assert grouped(cost, 6) == tuple((h,) for h in range(6))
    assert grouped(cost, 1) == (tuple(range(6)),)


def test_a_group_of_three_comes_closer_to_its_mean() -> None:
    heads = [_draw(s, 50, D) for s in range(3)]
    moments = _moments(heads)
    q = rotations(moments, 3, ((0, 1, 2),), FREE)

    def spread(turned: list[Tensor]) -> float:
        mean = torch.stack(turned).mean(0)
        return float(sum((x - mean).square().sum() for x in turned))

    assert spread([x @ r for x, r in zip(heads, q, strict=True)]) < 0.9 * spread(heads)
