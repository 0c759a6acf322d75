"""Which tensor of tokens the queries are made from, and when it is not proven."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.errors import Decline
from attnopt.mix.tokens import Tokens, tokens
from attnopt.patterns import projections
from attnopt.patterns.projections import Projections
from tests.passes.tiny import INNER, model, stage


def _found(module: nn.Module, x: Tensor) -> Any:
    at = stage(module, x)
    (region,) = at.regions.values()
    made = projections.find(region)
    assert isinstance(made, Projections), str(made)
    return tokens(region, made.q)


@pytest.mark.parametrize("layout", ["separate", "concatenated", "interleaved", "grouped", "conv"])
@pytest.mark.parametrize("rotary", [False, True])
def test_tokens_of_every_layout(layout: str, rotary: bool) -> None:
    found = _found(*model(layout, rotary=rotary))
    assert isinstance(found, Tokens), str(found)
    assert found.width == INNER
    assert found.folded == (layout == "conv")


def test_a_batch_of_one() -> None:
    module, x = model("separate", rotary=True)
    found = _found(module, x[:1])
    assert isinstance(found, Tokens), str(found)
    assert not found.folded


def test_positions_first_is_not_taken_for_batch_first() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model("separate")[0]

        def forward(self, x: Tensor) -> Tensor:
            n, b, _ = x.shape
            q, k, v = (p(x).view(n, b, 4, 6).permute(1, 2, 0, 3) for p in (self.inner.q, self.inner.k, self.inner.v))
            return self.inner.o(((q @ k.mT).softmax(-1) @ v).permute(2, 0, 1, 3).reshape(n, b, INNER))

    found = _found(Turned(), torch.randn(5, 5, INNER, dtype=torch.float64))
    assert isinstance(found, Decline)
    assert "rows of one tensor" in str(found)
