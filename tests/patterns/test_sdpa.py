"""`scaled_dot_product_attention`: what an additive mask with minima means, and grouped heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

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


@pytest.mark.parametrize(("bias", "keep"), [(causal_upper_left, "k <= q"), (causal_lower_right, "k <= q + 2")])
def test_a_causal_bias_object_is_read_through_dynamo(bias: Callable[..., torch.Tensor], keep: str) -> None:
    inputs = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    run = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias(7, 9)))
    fast = attnopt.optimize(run, inputs, options={"kernel": "reference"})
    (site,) = fast.report.sites
    assert f"keep {keep} " in str(site.spec)
    torch.testing.assert_close(fast(*inputs), run(*inputs))


def test_keys_and_values_under_separate_names_are_equally_many() -> None:
    run = Function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    auto = torch.export.Dim.DYNAMIC
    shapes = ((None, {2: auto}, {2: auto}),)
    fast = attnopt.optimize(run, (Q, K, K), strict=True, dynamic_shapes=shapes, options={"kernel": "reference"})
    k, v = torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 8)
    torch.testing.assert_close(fast(Q, k, v), run(Q, k, v))
    with pytest.raises(attnopt.AttnoptError, match="11"):
        fast(Q, k, v[:, :, 1:])


def test_more_values_than_keys() -> None:
    with pytest.raises(attnopt.AttnoptError, match="9 keys and 8 values"):
        attnopt.optimize(Function(F.scaled_dot_product_attention), (Q, K, K[:, :, 1:]), strict=True)
