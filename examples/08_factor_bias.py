"""A learned table of biases as a few further dimensions of query and key (FlashBias)."""

from __future__ import annotations

import torch
from torch import nn

import attnopt
from attnopt.rewrites import FactorBias, Tolerance


class WindowAttention(nn.Module):
    """Attention over a square window with a learned bias for every offset of rows and columns, as in Swin."""

    def __init__(self, side: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.d, n = heads, width // heads, side * side
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        offsets = torch.arange(1 - side, side) / side
        near = -(offsets[:, None] ** 2 + offsets**2).flatten()
        # Trained tables are smooth: near is better than far, how much differs by head.
        self.table = nn.Parameter((near[:, None] * torch.arange(1, heads + 1)).exp() * 2)
        row, column = torch.arange(n) // side, torch.arange(n) % side
        places = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
        self.register_buffer("places", places.flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, n, width = x.shape
        q, k, v = (t.view(B, n, self.heads, self.d).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        bias = self.table[self.places].view(n, n, self.heads).permute(2, 0, 1)
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.d**-0.5 + bias, dim=-1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, n, width))


torch.manual_seed(0)
rewrites = [FactorBias(tolerance=0.02)]
for side in (7, 24):
    model = WindowAttention(side).eval()
    x = torch.randn(1, side * side, 64)
    fast = attnopt.optimize(model, (x,), rewrites=rewrites, tolerance=Tolerance(output=0.02))
    (site,) = fast.report.sites
    print(f"{side} x {side} window: {site.status}; {site.spec}")
    for note in fast.report.notes:
        print(f"  {note}")
    with torch.no_grad():
        change = ((fast(x) - model(x)).norm() / model(x).norm()).item()
    print(f"  the output changed by {change:.1e}, relative")
    assert change < 0.02

rank = site.spec.heads.d_qk - model.d
print(f"\nrank {rank}: {2 * rank * 24**2} numbers a head instead of {24**4}")
assert site.status == "rewritten"
assert site.spec.captures == (), "the table is gone from the kernel"
assert fast.get_parameter("table").numel() == 0, "and from memory"
