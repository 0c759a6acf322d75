"""Which site breaks a model? Fuse one more site at a time and see where the answer changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import attnopt


class Layer(nn.Module):
    """Self-attention of 2 heads, causal or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 8**0.5
        if self.causal:
            n = torch.arange(x.shape[1])
            scores = scores.masked_fill(n[None, :] > n[:, None], float("-inf"))
        return x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def forgetful(node: Any, constants: Mapping[str, torch.Tensor]) -> Any:
    """A pattern of our own with a bug: it forgets the mask."""
    found = softmax.match(node, constants)
    if hasattr(found, "spec"):
        found = found.replace(spec=attnopt.AttentionSpec(found.spec.heads, found.spec.score))
    return found


softmax = next(pattern for pattern in attnopt.PATTERNS if pattern.name == "softmax")
patterns = (attnopt.Pattern("forgetful", forgetful),)
torch.manual_seed(0)
model, x = nn.Sequential(*(Layer(causal=i > 1) for i in range(4))).eval(), torch.randn(1, 6, 16)

first_bad = None
for fuel in range(5):
    # Without validation, which would have found and declined the site by itself.
    fast = attnopt.optimize(model, (x,), validate=False, options={"patterns": patterns, "fuel": fuel})
    error = (fast(x) - model(x)).abs().max().item()
    good = error < 1e-4
    print(f"fuel {fuel}: {fast.report.fused} sites fused, error {error:.1e}, {'good' if good else 'wrong'}")
    if not good and first_bad is None:
        first_bad = fast.report.sites[fuel - 1]

assert first_bad is not None
print(f"the first wrong site is {first_bad.name} in module {first_bad.module_path!r} ({first_bad.source})")
print(f"  {first_bad.formula}")
assert first_bad.module_path == "2", "the first causal layer"

fast = attnopt.optimize(model, (x,), options={"patterns": patterns})
print(f"with validation: {fast.report.summary}")
assert fast.report.declined == 2
torch.testing.assert_close(fast(x), model(x))
