"""A bias gathered by distance is drawn as one line a head, in the source's own buckets."""

from __future__ import annotations

import torch

import attnopt
from tests.modules import Function


def _relative(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    gap = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    far = (gap.abs().float().clamp(min=1).log() * 2).long()
    bucket = torch.where(gap > 0, far.clamp(max=3) + 4, far.clamp(max=3))
    bias = torch.nn.functional.embedding(bucket, table).permute(2, 0, 1)
    return (q @ k.mT + bias).softmax(-1) @ k


def test_a_bucketed_bias_becomes_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, table = (torch.randn(s, generator=generator) for s in ((2, 4, 7, 8), (2, 4, 9, 8), (8, 4)))
    fast = attnopt.optimize(Function(_relative), (q, k, table), strict=True)
    assert "bias[h, k - q + 6]" in str(fast.report.sites[0].spec)
    torch.testing.assert_close(fast(q, k, table), _relative(q, k, table))
