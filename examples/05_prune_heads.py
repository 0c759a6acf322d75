"""An approximate rewrite: remove a quarter of the heads, within a tolerance that is measured on your own inputs."""

from __future__ import annotations

import torch
from torch import nn

import attnopt


class Attention(nn.Module):
    """Eight heads, of which two hardly matter: their rows of the output projection are almost zero."""

    def __init__(self, width: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        with torch.no_grad():
            self.o.weight[:, : 2 * self.d] *= 1e-4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, width = x.shape
        q, k, v = (p(x).view(B, S, self.heads, self.d).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.d**-0.5, dim=-1)
        return self.o((weights @ v).transpose(1, 2).reshape(B, S, width))


torch.manual_seed(0)
model = Attention().eval()
x = torch.randn(2, 24, 64)
calibration = [(torch.randn(2, 24, 64),) for _ in range(4)]

small = attnopt.optimize(
    model,
    (x,),
    rewrites=[attnopt.rewrites.PruneHeads(fraction=0.25)],
    calibration=calibration,
    tolerance=0.01,
)
print(small.report)

size, size_before = (sum(p.numel() for p in m.parameters()) for m in (small, model))
with torch.no_grad():
    change = ((small(x) - model(x)).norm() / model(x).norm()).item()
print(f"\n{size_before} parameters before, {size} after; the output changed by {change:.1e}, relative")

assert small.report.rewritten == 1
assert size < 0.8 * size_before
assert change < 0.01
assert model.q.weight.shape == (64, 64), "the model itself is never changed"
