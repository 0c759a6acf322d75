"""`scaled_dot_product_attention` as a backend, for the specs that it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Cost:
    """Microseconds of an fp32 attention on one core: of a call, of each head, and of 1,000 multiply-adds."""

    call: float
    head: float
    product: float


# Measured on AVX2 for one query and for several; what counts is how one way compares with the other.
_OURS = {True: Cost(13.5, 0.17, 0.115), False: Cost(13.5, 0.4, 0.033)}
_SDPA = {True: Cost(6, 0.24, 0.15), False: Cost(6, 0.85, 0.039)}
_MARGIN = 0.95


def cheaper(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why a plain attention should stay `scaled_dot_product_attention` rather than call a kernel; empty if not.

    Args:
        q, k, v: tensors or fake ones, `[..., H, N, D]`, of equally many heads. Only their metadata are read.
    """
    known = all(isinstance(size, int) for t in (q, k, v) for size in t.shape)
    if not known or q.dim() != 4 or q.device.type != "cpu" or q.dtype != torch.float32:
        return ""
    if q.shape[:2] != k.shape[:2] or q.shape[3] != v.shape[3] or 0 in (*q.shape, *k.shape):
        return ""
    heads, one = q.shape[0] * q.shape[1], q.shape[2] == 1
    products = heads * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3]) / 1e3
    theirs, ours = (c.call + c.head * heads + c.product * products for c in (_SDPA[one], _OURS[one]))
    if theirs > _MARGIN * ours:
        return ""
    return f"the call is short: an estimated {theirs:.0f} µs, {ours:.0f} µs with a kernel of its own"


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
