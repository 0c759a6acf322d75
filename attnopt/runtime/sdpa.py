"""`scaled_dot_product_attention` as a backend, for the specs that it computes."""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Heads, Softmax

_CAUSAL = sp.Ge(ex.q - ex.k, 0)


def sdpa_scale(spec: AttentionSpec) -> float | None:
    """The scale with which `scaled_dot_product_attention` computes the spec; None if it does not.

    It does for a constant scale, all keys or the causal ones (query i sees keys 0..i), and grouped heads.
    """
    heads = spec.heads
    if heads.k != heads.v or heads != Heads(heads.q, heads.k, heads.v, heads.d_qk, heads.d_v):
        return None
    if spec.normalizer != Softmax() or spec.gate != 1 or spec.weight != 1 or spec.dropout or spec.returns or spec.merge:
        return None
    if spec.select is not None or spec.rows != sp.true or (spec.keep != sp.true and spec.keep != _CAUSAL):
        return None
    scale = spec.score / ex.s
    return float(scale) if scale.is_number and scale.is_finite else None


class Sdpa:
    """Runs a spec for which `sdpa_scale` is not None."""

    name = "sdpa"

    def __init__(self, spec: AttentionSpec) -> None:
        self.scale = sdpa_scale(spec)
        self.causal = spec.keep == _CAUSAL
        self.grouped = spec.heads.q != spec.heads.k

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, None]:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )
        return out, None
