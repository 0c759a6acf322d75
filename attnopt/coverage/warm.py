"""Imported once, by the server that rows are forked from: what every row would otherwise load for itself."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from attnopt.coverage import diffusion, measure
from attnopt.coverage.catalogue import transformers
from attnopt.coverage.graphs import treat
from attnopt.options import Options

__all__ = ["diffusion", "measure"]


class _Attention(nn.Module):
    """The smallest model that goes through capture, recognition and lowering."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Self-attention of `[batch, heads, length, width]`."""
        mask = torch.arange(4)[None, :] <= torch.arange(4)[:, None]
        return torch.softmax((x @ x.mT * 0.5).masked_fill(~mask, float("-inf")), -1) @ x


def warm() -> None:
    """Capture and lower one attention, on one thread, since a fork does not take threads along."""
    torch.set_num_threads(1)
    from transformers.models.auto import modeling_auto  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        treat(_Attention(), {"x": torch.randn(1, 1, 4, 4)}, Options.make({"kernel": "reference"}))


transformers()
warm()
