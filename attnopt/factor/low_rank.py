"""Tables of a bias `[heads, n_q, n_k]` as products of thin factors, or as one value a distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def line_of(table: Tensor) -> Tensor | None:
    """`[heads, n_q + n_k - 1]`, the values by `k - q` ascending, if a table depends on nothing else: bit by bit."""
    heads, n_q, n_k = table.shape
    line = torch.cat([table[:, :, 0].flip(1), table[:, 0, 1:]], 1)
    places = torch.arange(n_k)[None, :] - torch.arange(n_q)[:, None] + n_q - 1
    same = all(torch.equal(line[h][places], table[h]) for h in range(heads))
    return line.contiguous() if same else None


class Factors:
    """The singular values and vectors of a table, with the heads that share a key head as one matrix.

    Args:
        table: `[Hq, n_q, n_k]`, finite.
        k_map: the key head of each query head.
        centred: whether what a row's keys have in common may go, as it cancels in a softmax.
    """

    def __init__(self, table: Tensor, k_map: Sequence[int], centred: bool) -> None:
        table = table.double()
        self.k_map = tuple(k_map)
        self.table = table - table.mean(-1, keepdim=True) if centred else table
        self.groups = [[h for h, head in enumerate(k_map) if head == key] for key in range(max(k_map) + 1)]
        self.parts = [torch.linalg.svd(self.table[group].flatten(0, 1), full_matrices=False) for group in self.groups]

    @property
    def size(self) -> float:
        """Root mean square of the table, without what cancels."""
        return float(self.table.square().mean().sqrt())

    def rank(self, tolerance: float) -> int:
        """The smallest rank at which the error of every head, relative to the head's own norm, is within it."""
        full = min(len(values) for _, values, _ in self.parts)
        low, high = 0, full
        while low < high:  # the error falls as the rank grows
            middle = (low + high) // 2
            low, high = (low, middle) if self.error(middle) <= tolerance else (middle + 1, high)
        return low

    def error(self, rank: int) -> float:
        """The greatest relative error of a head at a rank: in the Frobenius norm, as both have zeros for nothing."""
        query, key = self.factors(rank)
        gap = self.table - query @ key[list(self.k_map)].transpose(1, 2)
        size = self.table.flatten(1).norm(dim=1)
        return float((gap.flatten(1).norm(dim=1) / size.clamp_min(torch.finfo(torch.float64).tiny)).max())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`[Hq, n_q, rank]` and `[Hk, n_k, rank]`, whose products are the table; of equal size."""
        heads, n_q, n_k = self.table.shape
        query, key = self.table.new_zeros(heads, n_q, rank), self.table.new_zeros(len(self.groups), n_k, rank)
        for place, (group, (u, values, v)) in enumerate(zip(self.groups, self.parts, strict=True)):
            found = min(rank, len(values))
            root = values[:found].sqrt()
            query[group, :, :found] = (u[:, :found] * root).unflatten(0, (len(group), n_q))
            key[place, :, :found] = v[:found].t() * root
        return query, key
