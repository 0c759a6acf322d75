"""Spellings of attention and the spec that each must be read as: rows of (name, function, spec text).

Every function takes q, k, v of `[2, 4, 7, 8]`, `[2, 4, 9, 8]`, `[2, 4, 9, 8]` unless `shapes` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Q, K = 7, 9
MIN = torch.finfo(torch.float32).min
_PAD = torch.tensor([[1] * 9, [1] * 5 + [0] * 4], dtype=torch.bool)
_PAD_ROWS = torch.tensor([[1] * 9, [0] * 9], dtype=torch.bool)
_BIAS = torch.linspace(-2, 2, 4 * Q * K).view(4, Q, K).sin()


@dataclass(frozen=True)
class Spelling:
    """One way to write an attention. `extra` tensors follow q, k and v as arguments."""

    name: str
    run: Callable[..., torch.Tensor]
    spec: str
    shapes: tuple[tuple[int, ...], ...] = ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 8))
    extra: tuple[torch.Tensor, ...] = field(default=())


def _softmax(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ v


def _mask_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT
    scores /= 4
    scores.masked_fill_(~pad[:, None, None, :], float("-inf"))
    return _softmax(scores, v)


def _slices_assigned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    region = torch.zeros(Q)
    region[3:] = 1
    mask = torch.where(region[:, None] == region[None, :], 0.0, float("-inf"))
    return _softmax(q @ k.mT + mask, v)


def _nano_gpt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    tril = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    return _softmax(scores.masked_fill(tril[:, :, :Q, :K] == 0, float("-inf")), v)


def _folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1), v).view(2, 4, Q, 8)


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x[:, :, None].expand(2, 2, 2, K, 8).reshape(2, 4, K, 8) for x in (k, v))
    return _softmax(q @ k.mT, v)


def _alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    distance = torch.arange(K)[None, :] - torch.arange(Q)[:, None]
    return _softmax(q @ k.mT / 2 + slopes[:, None, None] * distance, v)


def _window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    gap = torch.arange(Q)[:, None] - torch.arange(K)
    return _softmax(torch.where((gap >= 0) & (gap < 3), q @ k.mT, MIN), v)


def _prefix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    return _softmax((q @ k.mT).masked_fill(~((j <= i) | (j < 4)), float("-inf")), v)


def _additive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    mask = (1.0 - pad[:, None, None, :].float()) * MIN
    return _softmax(q @ k.mT / math.sqrt(8) + mask, v)


def _soft_cap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ k.mT / 30.0) * 30.0
    i = torch.arange(Q)[:, None]
    return _softmax(scores + torch.where(torch.arange(K) > i, float("-inf"), 0.0), v)


def _einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


CAUSAL_TL = "keep k <= q (empty row: nan)"
SPELLINGS = (
    Spelling("plain", lambda q, k, v: _softmax(q @ k.mT, v), "4 heads, d=8; score s"),
    Spelling("scale_on_query", lambda q, k, v: _softmax((q * 0.25) @ k.mT, v), "4 heads, d=8; score s/4"),
    Spelling("scale_on_both", lambda q, k, v: _softmax((q / 2) @ (k / 2).mT, v), "4 heads, d=8; score s/4"),
    Spelling("scale_divides", lambda q, k, v: _softmax(q @ k.mT / 8.0, v), "4 heads, d=8; score s/8"),
    Spelling(
        "transposes",
        lambda q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)), dim=3), v).transpose(1, 2),
        "4 heads, d=8; score s",
    ),
    Spelling("upcast", lambda q, k, v: (q @ k.mT).float().softmax(-1, dtype=torch.float32).to(v.dtype) @ v, "4 heads, d=8; score s"),
    Spelling("folded_heads", _folded, "4 heads, d=8; score s/2"),
    Spelling("einsum", _einsum, "4 heads, d=8; score s", ((2, Q, 4, 8), (2, K, 4, 8), (2, K, 4, 8))),
    Spelling("one_head", lambda q, k, v: _softmax(q @ k.mT, v), "1 heads, d=8; score s", ((2, Q, 8), (2, K, 8), (2, K, 8))),
    Spelling("two_dimensions", lambda q, k, v: _softmax(q @ k.mT, v), "1 heads, d=8; score s", ((Q, 8), (K, 8), (K, 8))),
    Spelling("five_dimensions", lambda q, k, v: _softmax(q @ k.mT, v), "4 heads, d=8; score s", ((2, 3, 4, Q, 8), (2, 3, 4, K, 8), (2, 3, 4, K, 8))),
    Spelling("value_width", lambda q, k, v: _softmax(q @ k.mT, v), "4 heads, d=8/5; score s", ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 5))),
    Spelling("repeat_kv", _repeated, "4/2 heads, d=8; score s", ((2, 4, Q, 8), (2, 2, K, 8), (2, 2, K, 8))),
    Spelling(
        "repeat_interleave",
        lambda q, k, v: _softmax(q @ k.repeat_interleave(2, 1).mT, v.repeat_interleave(2, 1)),
        "4/2 heads, d=8; score s", ((2, 4, Q, 8), (2, 2, K, 8), (2, 2, K, 8)),
    ),
    Spelling("multi_query", lambda q, k, v: _softmax(q @ k.mT, v), "4/1 heads, d=8; score s", ((2, 4, Q, 8), (2, 1, K, 8), (2, 1, K, 8))),
    Spelling("shared_batch", lambda q, k, v: _softmax(q @ k.mT, v), "4 heads, d=8; score s", ((2, 4, Q, 8), (1, 4, K, 8), (1, 4, K, 8))),
    Spelling("nano_gpt", _nano_gpt, f"4 heads, d=8; score 0.353553*s; {CAUSAL_TL}"),
    Spelling("window", _window, "4 heads, d=8; score s; keep k <= q and q <= k + 2 (empty row: uniform)"),
    Spelling("prefix", _prefix, "4 heads, d=8; score s; keep k <= 3 or k <= q (empty row: nan)"),
    Spelling("alibi", _alibi, "4 heads, d=8; score s/2 + (k - q)*bias[h]"),
    Spelling("soft_cap", _soft_cap, f"4 heads, d=8; score 30*tanh(s/30); {CAUSAL_TL}"),
    Spelling("slices_assigned", _slices_assigned, "4 heads, d=8; score s; keep where(3 <= k, -1, 0) + where(3 <= q, 1, 0) == 0 (empty row: nan)", ((2, 4, Q, 8),) * 3),
    Spelling("dense_bias", lambda q, k, v, bias: _softmax(q @ k.mT + bias, v), "4 heads, d=8; score s + bias[h, q, k]", extra=(_BIAS,)),
    Spelling("mask_in_place", _mask_in_place, "4 heads, d=8; score s/4; keep mask[b, k] (empty row: nan)", extra=(_PAD,)),
    Spelling("additive_min", _additive, "4 heads, d=8; score 0.353553*s; keep mask[b, k] (empty row: uniform)", extra=(_PAD_ROWS,)),
    Spelling(
        "minus_ten_thousand",
        lambda q, k, v, pad: _softmax(q @ k.mT + torch.where(pad[:, None, None], 0.0, -1e4), v),
        "4 heads, d=8; score s + where(mask[b, k], 0, -10000)", extra=(_PAD_ROWS,),
    ),
    Spelling("sdpa", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "4 heads, d=8; score 0.353553*s"),
    Spelling("sdpa_scale", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), "4 heads, d=8; score s/2"),
    Spelling(
        "sdpa_causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "4 heads, d=8; score 0.353553*s; keep k <= q (empty row: zero)",
    ),
    Spelling(
        "sdpa_boolean_mask", lambda q, k, v, pad: F.scaled_dot_product_attention(q, k, v, pad[:, None, None, :].expand(2, 1, Q, K)),
        "4 heads, d=8; score 0.353553*s; keep mask[b, k] (empty row: zero)", extra=(_PAD_ROWS,),
    ),
    Spelling(
        "sdpa_bias", lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias.expand(2, 4, Q, K)),
        "4 heads, d=8; score 0.353553*s + bias[h, q, k]", extra=(_BIAS,),
    ),
    Spelling(
        "sdpa_grouped", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "4/2 heads, d=8; score 0.353553*s", ((2, 4, Q, 8), (2, 2, K, 8), (2, 2, K, 8)),
    ),
)  # fmt: skip
