"""The independent count, on attentions and on what only looks like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnopt.capture import capture
from attnopt.coverage.witness import normalizers, witness

X = torch.randn(2, 4, 8, 16)


class _Model(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear, x)


def _hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weights = (x @ x.mT).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ x


ATTENTIONS = {
    "plain": lambda f, x: torch.softmax(x @ x.mT, -1) @ x,
    "einsum": lambda f, x: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", x, x).softmax(-1), x),
    "masked and dropped out": lambda f, x: F.dropout((x @ x.mT).masked_fill(x @ x.mT < 0, -1e4).softmax(-1)) @ x,
    "sdpa": lambda f, x: F.scaled_dot_product_attention(x, x, x),
    "by hand": _hand,
    "sliced sink": lambda f, x: torch.cat([x @ x.mT, x[..., :1]], -1).softmax(-1)[..., :-1] @ x,
}
OTHERS = {
    "router": lambda f, x: torch.softmax(f(x), -1) * x,
    "classifier": lambda f, x: torch.softmax(f(x), -1),
    "scores of a layer": lambda f, x: torch.softmax(f(x), -1) @ x.mT,
    "weights only": lambda f, x: torch.softmax(x @ x.mT, -1),
    "through a layer": lambda f, x: f((x @ x.mT).softmax(-1).repeat(1, 1, 1, 2)) @ x.mT,
}


def _witness(function: Callable[..., torch.Tensor]) -> tuple[int, int]:
    seen = witness(capture(_Model(function), (X,), {}).gm.graph)
    return len(seen.sites), len(seen.others)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_is_counted(name: str) -> None:
    assert _witness(ATTENTIONS[name])[0] == 1


@pytest.mark.parametrize("name", OTHERS)
def test_another_softmax_is_counted_apart(name: str) -> None:
    assert _witness(OTHERS[name]) == (0, 1)


def test_calls_that_may_make_weights_are_counted_as_users_write_them() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        x = F.scaled_dot_product_attention(x, x, x) + x.softmax(-1) + torch.softmax(x, -1) + torch.exp(x)
        return torch.relu(x).tanh()

    assert len(normalizers(torch.fx.symbolic_trace(model).graph)) == 4
