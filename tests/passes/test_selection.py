"""The table of operators through which a selection moves."""

from __future__ import annotations

import pytest
import torch

from attnopt.passes.selection import RULES
from tests.passes.test_restrict import restricted

F = torch.nn.functional


def test_every_rule_is_for_an_operator_that_exists() -> None:
    for name in RULES:
        assert hasattr(torch.ops.aten, name.removeprefix("aten::")), name


@pytest.mark.parametrize("keep", [(0, 1), (0, 2), (1, 2, 3), (3,)])
def test_grouped_attention_keeps_each_query_heads_key_head(keep: tuple[int, ...]) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x[:, :2] * 2, x[:, 2:] * 3, enable_gqa=True)

    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    seen, _ = restricted(attend, x, 1, keep)
    torch.testing.assert_close(seen, attend(x)[:, list(keep)], rtol=1e-12, atol=1e-12)


def test_a_mask_by_head_is_restricted_and_a_broadcast_one_is_not() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(4.0, dtype=x.dtype)[:, None, None] * torch.ones(3, 3, dtype=x.dtype).tril()
        return F.scaled_dot_product_attention(x, x, x, mask) + F.scaled_dot_product_attention(x, x, x, mask[3])

    x = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    seen, _ = restricted(attend, x, 1, (1, 3))
    torch.testing.assert_close(seen, attend(x)[:, [1, 3]], rtol=1e-12, atol=1e-12)


def test_an_embedding_is_restricted_in_its_table() -> None:
    table = torch.randn(7, 4)
    seen, made = restricted(lambda x: F.embedding(torch.arange(6).view(2, 3), x), table, 2, (0, 3))
    assert torch.equal(seen, table[:6].view(2, 3, 4)[..., [0, 3]])
    assert made == ["aten::index_select", "aten::embedding"]
