"""Heads as a mixture (MoH): each token uses the heads that matter to it, and the kernel computes no others."""

from __future__ import annotations

import torch
from torch import nn

import attnopt
from attnopt.rewrites import MixHeads, Tolerance


class Attention(nn.Module):
    """Causal attention whose heads matter to tokens of different kinds: each listens to one part of the features."""

    def __init__(self, width: int = 128, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.d = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        with torch.no_grad():
            for h in range(heads):
                rows, part = slice(h * self.d, (h + 1) * self.d), slice(h * self.d, (h + 1) * self.d)
                kept = 4 * self.q.weight[rows, part].clone()
                self.q.weight[rows] *= 0.02
                self.q.weight[rows, part] = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, n, width = x.shape
        q, k, v = (p(x).view(B, n, self.heads, self.d).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, n, width))


def tokens(seed: int) -> torch.Tensor:
    """Tokens of eight kinds: each kind is loud in its own part of the features."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 8, (1, 512), generator=generator)
    loud = nn.functional.one_hot(kinds, 8).repeat_interleave(16, -1)
    return torch.randn(1, 512, 128, generator=generator) * (0.1 + 3 * loud)


torch.manual_seed(0)
model, x = Attention().eval(), tokens(0)
calibration = [(tokens(i),) for i in range(1, 5)]
changes = {}
for router in ("norm", "linear"):
    mixed = attnopt.optimize(
        model,
        (x,),
        rewrites=[MixHeads(shared=1, active=3, router=router)],
        calibration=calibration,
        tolerance=Tolerance(output=0.9),
    )
    (site,) = mixed.report.sites
    changes[router] = mixed.report.figures["mix_heads"]["output change"]
    print(f"router {router}: {site.status}; {site.spec}")
    print(f"  half of the heads are off for each token; the output changed by {changes[router]:.2f}, relative")
    assert site.status == "rewritten"

part = x[:, :16]
short = attnopt.optimize(model, (part,), rewrites=[MixHeads(shared=1, active=3)], calibration=[(part,)], tolerance=0.9)
print(f"\n16 tokens: {short.report.notes[0]}")
assert [s.status for s in short.report.sites] == ["fused"], "at this length a router costs more than it saves"
assert all(change < 0.9 for change in changes.values())
