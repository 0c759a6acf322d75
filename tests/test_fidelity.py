"""A model that computes something else while it is traced keeps its own answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.errors import UnfusedError

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Wayward(nn.Module):
    """Causal where it runs, and not where it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=not torch.compiler.is_compiling()) * scale


class Noisy(nn.Module):
    """Random at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + torch.randn_like(x)


class Counting(Wayward):
    """Writes to a buffer and to a list that it is given."""

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        self.calls.add_(1)
        seen[0].add_(x.sum())
        return F.scaled_dot_product_attention(x, x, x)


def test_the_model_runs_as_it_is() -> None:
    model = Wayward().eval()
    fast = attnopt.optimize(model, (X,))
    assert torch.equal(fast(X), model(X))
    assert fast.report.fused == 0
    assert fast.report.declined == 1
    assert "while it is traced" in str(fast.report)
    fast(X).sum().backward()
    assert model.project.weight.grad is not None


def test_strict_says_so() -> None:
    with pytest.raises(UnfusedError, match="while it is traced"):
        attnopt.optimize(Wayward().eval(), (X,), strict=True)


def test_without_validation_the_graph_is_taken_at_its_word() -> None:
    assert attnopt.optimize(Wayward().eval(), (X,), validate=False).report.fused == 1


def test_a_random_model_is_no_such_model() -> None:
    assert attnopt.optimize(Noisy().eval(), (X[:, None],)).report.fused == 1


def test_what_the_model_writes_to_is_not_written_to() -> None:
    model, seen = Counting().eval(), [torch.zeros(())]
    fast = attnopt.optimize(model, (X[:, None], seen))
    assert fast.report.fused == 1
    assert float(model.calls) == 0
    assert float(seen[0]) == 0


def test_outputs_of_other_kinds_are_not_compared() -> None:
    class Odd(Wayward):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return {"out": super().forward(x), "count": 3}

    fast = attnopt.optimize(Odd().eval(), (X,))
    assert fast(X)["count"] == 3
    assert fast.report.fused == 0
