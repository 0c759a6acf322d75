"""Which heads resemble one another, and the rotations that bring them together: linear algebra on second moments.

Everything is computed from the moments `M = X' X` of the outputs of a projection (rows of `X` are tokens, its columns
the features of all heads), in fp64. A head is rotated as `x -> x Q` with orthogonal `Q`, taken from those that leave
attention as it is (`Freedom`); the best one for a pair is the orthogonal Procrustes solution (Schoenemann 1966), for a
group the generalised one (Gower 1975).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS, _GAIN = 100, 1e-10
_STARTS = 16


@dataclass(frozen=True)
class Freedom:
    """The rotations of a head's features that attention does not see.

    Attributes:
        planes: pairs of features that may be turned by an angle; those of RoPE.
        free: sets of features that may be rotated by any orthogonal matrix.
    """

    planes: tuple[tuple[int, int], ...] = ()
    free: tuple[tuple[int, ...], ...] = ()

    @property
    def size(self) -> int:
        """How many features take part in a rotation."""
        return 2 * len(self.planes) + sum(map(len, self.free))


def nearest(c: Tensor, freedom: Freedom) -> Tensor:
    """The allowed rotation `Q` with the largest `<Q, c>`: c `[..., d, d]` to the same, fp64."""
    q = torch.eye(c.shape[-1], dtype=c.dtype).expand_as(c).clone()
    for free in freedom.free:
        at = torch.tensor(free)
        u, _, wt = torch.linalg.svd(c[..., at[:, None], at])
        q[..., at[:, None], at] = u @ wt
    if freedom.planes:
        a, b = torch.tensor(freedom.planes).t()
        angle = torch.atan2(c[..., b, a] - c[..., a, b], c[..., a, a] + c[..., b, b])
        q[..., a, a] = q[..., b, b] = angle.cos()
        q[..., b, a] = angle.sin()
        q[..., a, b] = -angle.sin()
    return q


def distances(moments: Tensor, heads: int, freedom: Freedom) -> Tensor:
    """`min_Q |X_i Q - X_j|^2` of every pair of heads, over the energy of all: `[heads, heads]`."""
    blocks = _blocks(moments, heads)
    energy = torch.einsum("iidd->i", blocks)
    gain = (nearest(blocks, freedom) * blocks).sum((-1, -2))
    found = energy[:, None] + energy[None, :] - 2 * gain
    found.fill_diagonal_(0.0)
    return found.clamp_min(0.0) / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)


def grouped(cost: Tensor, groups: int) -> tuple[tuple[int, ...], ...]:
    """Heads in groups of equal size with a small sum of costs inside them: swaps from several starts, the best kept.

    Groups and their members are in ascending order. Deterministic.
    """
    heads = len(cost)
    size = heads // groups
    cost = ((cost + cost.t()) / 2).fill_diagonal_(0.0)
    draw = random.Random(0)
    starts = [list(range(heads)), *(draw.sample(range(heads), heads) for _ in range(_STARTS if size > 1 else 0))]
    best: tuple[float, list[list[int]]] | None = None
    for start in starts:
        owner = torch.empty(heads, dtype=torch.int64)
        owner[torch.tensor(start)] = torch.arange(heads) // size
        total = _improved(cost, owner, groups)
        if best is None or total < best[0] - 1e-12:
            best = total, [[h for h in range(heads) if owner[h] == g] for g in range(groups)]
    assert best is not None
    return tuple(sorted(tuple(members) for members in best[1]))


def _improved(cost: Tensor, owner: Tensor, groups: int) -> float:
    """Swap pairs of heads, the best swap first, until none helps; `owner` is changed in place."""
    place = torch.arange(len(cost))
    while True:
        member = torch.nn.functional.one_hot(owner, groups).to(cost.dtype)
        to_group = cost @ member  # the cost of head i in group g
        own = to_group[place, owner]
        across = to_group[:, owner]  # of head i in the group of head j
        change = across + across.t() - own[:, None] - own[None, :] - 2 * cost
        change[owner[:, None] == owner[None, :]] = 0.0
        i, j = divmod(int(change.argmin()), len(cost))
        if not change[i, j] < -1e-12:
            return float(own.sum())
        owner[i], owner[j] = owner[j].clone(), owner[i].clone()


def rotations(moments: Tensor, heads: int, groups: Sequence[Sequence[int]], freedom: Freedom) -> Tensor:
    """For each head the rotation that brings it closest to the mean of its group: `[heads, d, d]`.

    The first head of a group stays as it is, so that groups of one do not change.
    """
    blocks = _blocks(moments, heads)
    q = torch.eye(blocks.shape[-1], dtype=blocks.dtype).repeat(heads, 1, 1)
    for group in groups:
        for place, h in enumerate(group[1:], 1):
            q[h] = nearest(_toward(blocks, q, h, group[:place]), freedom)
        before = -torch.inf
        for _ in range(_ROUNDS):
            for h in group[1:]:
                q[h] = nearest(_toward(blocks, q, h, [g for g in group if g != h]), freedom)
            inside = itertools.permutations(group, 2)
            gain = float(sum((q[i] * (blocks[i, j] @ q[j])).sum() for i, j in inside))
            if gain - before <= _GAIN * abs(gain):
                break
            before = gain
    return q


def _toward(blocks: Tensor, q: Tensor, h: int, others: Sequence[int]) -> Tensor:
    """`X_h' sum_j X_j Q_j` over the other heads."""
    return sum((blocks[h, j] @ q[j] for j in others), torch.zeros_like(q[h]))


def _blocks(moments: Tensor, heads: int) -> Tensor:
    """The moments of every pair of heads: `[heads, heads, d, d]`."""
    d = moments.shape[0] // heads
    return moments.view(heads, d, heads, d).transpose(1, 2)
