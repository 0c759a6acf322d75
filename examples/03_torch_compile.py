"""The same through `torch.compile`: the backend is found by its name."""

from __future__ import annotations

import torch
from torch import nn

import attnopt.dynamo


class Attention(nn.Module):
    """Attention with a padding mask, as a model would pass it around."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


torch.manual_seed(0)
model = Attention()
q, k, v = (torch.randn(2, 4, 40, 32) for _ in range(3))
keep = torch.arange(40) < torch.tensor([[40], [25]])

# Without options the rest of the graph goes to Inductor; "eager" keeps this example free of its compile time.
fast = torch.compile(model, backend="attnopt", options={"rest": "eager"})
difference = (fast(q, k, v, keep) - model(q, k, v, keep)).abs().max().item()

report = attnopt.dynamo.reports[-1]
print(report)
print(f"\nlargest difference: {difference:.1e}")

assert report.fused == 1
assert difference < 1e-5
