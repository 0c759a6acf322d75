"""Small models that several rooms test with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnopt.capture import Captured, capture


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class SelfAttention(nn.Module):
    """Multi-head attention of 4 heads of width 4, causal, with a padding mask and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """`x [B, N, 16]`, `keep [B, N]` bool to `[B, N, 16]`."""
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 2
        n = torch.arange(x.shape[1])
        mask = n[None, :] <= n[:, None]
        if keep is not None:
            mask = mask & keep[:, None, None, :]
        weights = self.dropout(scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def captured(run: Callable[..., Any], *inputs: Any, **dynamic: Any) -> Captured:
    """The function captured at these inputs."""
    return capture(Function(run), inputs, {}, **dynamic)


def replay(graph: Captured, *inputs: Any) -> tuple[Any, ...]:
    """The captured graph's outputs; tensors that the trace made are passed along."""
    made = [graph.constants[s] for s in graph.states]
    return tuple(graph.gm(*made, *inputs))
