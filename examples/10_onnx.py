"""Export to ONNX: each attention becomes one operator, and the file is run and compared before it is handed out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import attnopt


class Block(nn.Module):
    """Grouped heads, a soft-cap, causal, with padding: spelled by hand."""

    def __init__(self, width: int = 64, heads: int = 8, shared: int = 2) -> None:
        super().__init__()
        self.groups, self.d = heads // shared, width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, shared * self.d) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        scores = 30 * torch.tanh(q @ k.transpose(-1, -2) * self.d**-0.5 / 30)
        n = torch.arange(x.shape[1])
        keep = (n[:, None] >= n) & mask[:, None, None, :]
        weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


torch.manual_seed(0)
model = Block().eval()
x, mask = torch.randn(2, 12, 64), torch.ones(2, 12, dtype=torch.bool)
mask[1, 9:] = False

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "block.onnx"
    sizes = {0: "batch", 1: "tokens"}
    report = attnopt.onnx.export(model, (x, mask), path, dynamic_shapes={"x": sizes, "mask": sizes})
    print(report)

    # Any length, any batch: the names of the inputs and of the sizes are the model's own.
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, mask = torch.randn(3, 40, 64), torch.ones(3, 40, dtype=torch.bool)
    (found,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})

with torch.no_grad():
    wanted = model(x, mask).numpy()
print(f"\nlargest difference at another size: {np.abs(found - wanted).max():.1e}")
assert [site.kernel for site in report.sites] == ["ai.onnx.Attention-23"]
assert np.allclose(found, wanted, atol=1e-5)
