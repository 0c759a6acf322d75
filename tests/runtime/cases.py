"""Small specs with a hand-written dense definition of each, and inputs for them."""

from __future__ import annotations

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Softmax

PLAIN = AttentionSpec(Heads(4, 2, 2, 8, 6), score=ex.s / 3)
CAUSAL = AttentionSpec(Heads(4, 2, 2, 8, 6), score=ex.s / 3, keep=sp.Ge(ex.q - ex.k, 0))
BIASED = AttentionSpec(
    Heads(4, 2, 2, 8, 6),
    score=ex.s / 3 + ex.load("bias", ex.h, ex.q, ex.k),
    keep=sp.Ge(ex.q - ex.k, 0),
    captures=(Capture("bias", "float", (4, None, None)),),
    returns=("lse",),
)


def padded(policy: EmptyRow, sink: bool = False) -> AttentionSpec:
    """Keys where `pad[b, k]` holds."""
    captures = [Capture("pad", "bool", (None, None))] + [Capture("sink", "float", (4,))] * sink
    return AttentionSpec(
        Heads(4, 4, 4, 8, 6),
        score=ex.s / 3,
        keep=sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0),
        normalizer=Softmax(ex.load("sink", ex.h) if sink else None),
        empty_row=policy,
        returns=("lse",),
        captures=tuple(captures),
    )


def inputs(
    spec: AttentionSpec, batch: int = 2, n_q: int = 5, n_k: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v for a spec."""
    heads, generator = spec.heads, torch.Generator().manual_seed(seed)

    def draw(count: int, length: int, width: int) -> Tensor:
        return torch.randn(batch, count, length, width, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads.q, n_q, heads.d_qk), draw(heads.k, n_k, heads.d_qk), draw(heads.v, n_k, heads.d_v)


def dense(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float, keep: Tensor | bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention by hand in fp64, NaN in empty rows; and its lse."""
    q, k, v = (t.detach().double() for t in (q, k, v))
    k, v = k[:, list(spec.heads.k_map)], v[:, list(spec.heads.v_map)]
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale + bias
    logits = logits.masked_fill(~torch.as_tensor(keep).broadcast_to(logits.shape), -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), v), logits.logsumexp(-1)
