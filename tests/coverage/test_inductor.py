from __future__ import annotations

import torch
from torch import nn

from attnopt.coverage.inductor import fusions


class _Attention(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = q @ q.transpose(-2, -1) / 4.0
        return torch.softmax(scores.tanh() + mask if self.masked else scores, -1) @ q


def test_the_matcher_counts_what_it_fuses_and_nothing_else() -> None:
    inputs = {"q": torch.randn(2, 4, 8, 16), "mask": torch.zeros(2, 1, 8, 8)}
    assert fusions(_Attention(masked=False), inputs) == 1
    assert fusions(_Attention(masked=True), inputs) == 0


def test_a_model_that_fails_says_why() -> None:
    found = fusions(_Attention(masked=False), {"q": torch.randn(2, 4, 8, 16), "mask": None, "more": 1})
    assert isinstance(found, str)
    assert "more" in found
