"""One optimised model for many batch sizes and lengths, and a clear error outside of what was captured."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim

import attnopt


class Encoder(nn.Module):
    """Two layers of PyTorch's own attention."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


torch.manual_seed(0)
model = Encoder().eval()
batch, length = Dim("batch", min=1, max=16), Dim("length", min=2, max=256)
fast = attnopt.optimize(model, (torch.randn(3, 20, 32),), dynamic_shapes={"x": {0: batch, 1: length}})
assert fast.report.fused == 2

with torch.no_grad():
    for size in ((1, 7), (3, 20), (5, 131)):
        x = torch.randn(*size, 32)
        difference = (fast(x) - model(x)).abs().max().item()
        print(f"batch {size[0]}, length {size[1]:3}: largest difference {difference:.1e}")
        assert difference < 1e-5

    try:
        fast(torch.randn(2, 300, 32))
    except attnopt.AttnoptError as error:
        print(f"length 300: {error}")
    else:
        raise AssertionError("a length outside the captured range must be an error")
