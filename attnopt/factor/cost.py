"""What a bias costs a score, as a table and as extra dimensions of the heads: estimates in fused multiply-adds.

A CPU kernel reads a table of one head from its cache if it fits there, and adds it in the time of a few products;
beyond that the read takes as long as about a dozen. A GPU reads it from far memory, where a product costs next to
nothing: up to rank 32 the factors are cheaper (FlashBias, section 4.2). The factors also have to be joined to query
and key at every call, which a short sequence does not earn back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Bytes of one head's table that stay in a core's cache, and multiply-adds that a loaded element is worth.
_CACHE, _NEAR, _FAR, _FAR_GPU = 256 * 1024, 4.0, 12.0, 64.0
# Multiply-adds that the copy of one element is worth.
_COPY = 4.0


@dataclass(frozen=True)
class Estimate:
    """Multiply-adds a score: what the bias costs now, and what its factors would. `rank`: how many dimensions."""

    now: float
    then: float
    rank: int

    @property
    def pays(self) -> bool:
        """Whether the factors are cheaper."""
        return self.then < self.now

    def __str__(self) -> str:
        return (
            f"{self.rank} further dimensions would cost about {self.then:.0f} multiply-adds a score, and the bias "
            f"as it is about {self.now:.0f}"
        )


def estimate(query: torch.Tensor, key: torch.Tensor, rank: int, table: bool, operations: int) -> Estimate:
    """For a query `[B, H, n_q, d]` and its keys: `table` says whether elements are loaded, `operations` what else."""
    n_q, n_k, width = query.shape[2], key.shape[2], query.shape[3] + rank
    gpu = query.device.type != "cpu"
    loaded = 0.0
    if table:
        near = n_q * n_k * 4 <= _CACHE
        loaded = _FAR_GPU if gpu else _NEAR if near else _FAR
    copies = 0.0 if gpu else _COPY * width * (n_q + n_k * key.shape[1] / query.shape[1]) / max(1, n_q * n_k)
    return Estimate(loaded + operations, rank + copies, rank)
