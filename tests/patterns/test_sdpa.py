"""`scaled_dot_product_attention`: what an additive mask with minima means, and grouped heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import attnopt
from tests.modules import Function
from tests.patterns.test_site import K, Q, region

MIN = torch.finfo(torch.float32).min


def test_an_empty_row_of_an_additive_minimum_is_uniform() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, torch.where(keep[:, None, None], 0.0, MIN))

    keep = torch.tensor([[True] * 9, [False] * 9])
    assert str(region(run, Q, K, keep).spec).endswith("keep mask[b, k] (empty row: uniform)")
    fast = attnopt.optimize(Function(run), (Q, K, keep), strict=True)
    torch.testing.assert_close(fast(Q, K, keep), run(Q, K, keep))


def test_grouped_heads() -> None:
    found = region(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), Q, K[:, :2].contiguous())
    assert found.spec.heads.k_map == (0, 0, 1, 1)
