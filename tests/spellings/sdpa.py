"""`scaled_dot_product_attention` with every form of its arguments, and the modules and functions built on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import BIAS, GROUPED, MIN, NEG_INF, PAD_ROWS, K, Q, Spelling

ROOT = "4 heads, d=8; score 0.353553*s"
sdpa = F.scaled_dot_product_attention


def _padded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, pad[:, None, None, :].expand(2, 1, Q, K))


def _additive(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The boolean mask as zeros and minus infinities."""
    mask = torch.zeros(2, 1, Q, K).masked_fill(~pad[:, None, None], NEG_INF)
    return sdpa(q, k, v, attn_mask=mask.to(q.dtype))


def _hugging_face(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    causal = torch.full((Q, K), MIN).triu(diagonal=1)[None, None]
    mask = causal.masked_fill(pad[:, None, None] == 0, MIN)
    return sdpa(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=0.0, scale=0.125)


def _grouped_masked(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sdpa(q, k, v, pad[:, None, None], enable_gqa=True)


ROWS = (
    Spelling("sdpa", lambda q, k, v: sdpa(q, k, v), ROOT, kernel="auto"),
    Spelling("sdpa_scale", lambda q, k, v: sdpa(q, k, v, scale=0.5), "4 heads, d=8; score s/2"),
    Spelling("sdpa_causal", lambda q, k, v: sdpa(q, k, v, is_causal=True), f"{ROOT}; keep k <= q (empty row: zero)", kernel="auto"),
    Spelling("sdpa_causal_positional", lambda q, k, v: sdpa(q, k, v, None, 0.0, True, scale=1), "4 heads, d=8; score s; keep k <= q (empty row: zero)"),
    Spelling("sdpa_boolean", _padded, f"{ROOT}; keep mask[b, k] (empty row: zero)", extra=(PAD_ROWS,), kernel="auto"),
    Spelling("sdpa_boolean_two_dimensions", lambda q, k, v: sdpa(q, k, v, torch.ones(Q, K, dtype=torch.bool).tril(2)), f"{ROOT}; keep k <= q + 2 (empty row: zero)"),
    Spelling("sdpa_minus_infinity", _additive, f"{ROOT}; keep mask[b, k] (empty row: zero)", extra=(PAD_ROWS,)),
    Spelling("sdpa_finfo_min", _hugging_face, "4 heads, d=8; score s/8; keep k <= q and mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("sdpa_bias", lambda q, k, v, bias: sdpa(q, k, v, bias.expand(2, 4, Q, K)), f"{ROOT} + bias[h, q, k]", extra=(BIAS,)),
    Spelling("sdpa_grouped", lambda q, k, v: sdpa(q, k, v, enable_gqa=True), "4/2 heads, d=8; score 0.353553*s", GROUPED),
    Spelling("sdpa_grouped_masked", _grouped_masked, "4/2 heads, d=8; score 0.353553*s; keep mask[b, k] (empty row: zero)", GROUPED, extra=(PAD_ROWS,)),
    Spelling("sdpa_three_dimensions", lambda q, k, v: sdpa(q, k, v), "1 heads, d=8; score 0.353553*s", ((2, Q, 8), (2, K, 8), (2, K, 8))),
    Spelling("sdpa_five_dimensions", lambda q, k, v: sdpa(q, k, v, is_causal=True), f"{ROOT}; keep k <= q (empty row: zero)", ((2, 3, 4, Q, 8), (2, 3, 4, K, 8), (2, 3, 4, K, 8))),
    Spelling("sdpa_value_width", lambda q, k, v: sdpa(q, k, v), "4 heads, d=8/5; score 0.353553*s", ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 5))),
    Spelling("sdpa_broadcast_batch", lambda q, k, v: sdpa(q, k, v), ROOT, ((2, 4, Q, 8), (1, 4, K, 8), (1, 4, K, 8))),
    Spelling("sdpa_dropout_off", lambda q, k, v: sdpa(q, k, v, dropout_p=0.0), ROOT),
)  # fmt: skip
