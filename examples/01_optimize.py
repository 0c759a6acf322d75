"""Optimise a model with attention written by hand: the same answers from a fused kernel."""

from __future__ import annotations

import torch
from torch import nn

import attnopt


class Block(nn.Module):
    """Causal self-attention as many models spell it: fused QKV, a mask of zeros and -inf, softmax, two matmuls."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, width = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.full((S, S), float("-inf")).triu(1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, S, width))


torch.manual_seed(0)
model = Block().eval()
x = torch.randn(2, 50, 64)

fast = attnopt.optimize(model, (x,))
print(fast.report)

with torch.no_grad():
    difference = (fast(x) - model(x)).abs().max().item()
print(f"\nlargest difference: {difference:.1e}")

assert fast.report.fused == 1
assert difference < 1e-5
assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True)), "parameters are shared"
