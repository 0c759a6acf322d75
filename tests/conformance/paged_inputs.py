"""Keys and values cut into pages of a shuffled pool, whose every other place is NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.runtime.pages import Operands


def lengths_of(batch: int, n_k: int) -> list[int]:
    """Ragged: the longest first, then none, then about half, then one key more than that."""
    return [(n_k, 0, (n_k + 1) // 2, n_k // 2 + 2)[b % 4] if b else n_k for b in range(batch)]


def paged(
    inputs: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int], page: int, captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (), seed: int = 3, n_new: int = 0,
) -> Operands:  # fmt: skip
    """Operands whose entry b has the first `lengths[b]` of the keys `[B, H, n, d]`; pages in no order.

    `n_new`: how many more each entry has, those that come next, in tensors of their own.
    """
    q, k, v = inputs
    new = tuple(
        torch.stack([t[b, :, n : n + n_new].transpose(0, 1) for b, n in enumerate(lengths)])
        for t in ((k, v) if n_new else ())
    )
    counts = [-(-n // page) for n in lengths]
    slots = max(1, *counts) + 1
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), slots), -1, dtype=torch.int32)
    pools = [torch.full((len(order), page, t.shape[1], t.shape[3]), torch.nan, dtype=t.dtype) for t in (k, v)]
    free = iter(order.tolist())
    for b, n in enumerate(lengths):
        for slot in range(counts[b]):
            place = next(free)
            table[b, slot] = place
            for pool, tensor in zip(pools, (k, v), strict=True):
                rows = tensor[b, :, slot * page : min(n, (slot + 1) * page)].transpose(0, 1)
                pool[place, : rows.shape[0]] = rows
    counted = torch.tensor(lengths, dtype=torch.int32)
    return Operands(q, *pools, table, counted, tuple(captures), tuple(scalars), new)
