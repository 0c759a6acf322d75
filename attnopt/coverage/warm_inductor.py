"""Imported once, where rows count what Inductor fuses: its patterns are traced at first use, for seconds."""

from __future__ import annotations

import torch
from torch import nn

from attnopt.coverage.inductor import fusions


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(-2, -1) / 2.0, -1) @ x


def warm() -> int | str:
    """Let the matcher trace its patterns, on one thread; how many attentions it found in a model with one."""
    torch.set_num_threads(1)
    return fusions(_Attention(), {"x": torch.randn(1, 1, 4, 4)})


warm()
