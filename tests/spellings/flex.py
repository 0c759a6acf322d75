"""`flex_attention` with the user's score and mask functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention

from tests.spellings.row import GROUPED, K, Q, Spelling, ramp

ROOT = "4 heads, d=8; score 0.353553*s"


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i - j <= 2


CAUSAL = create_block_mask(_causal, None, None, Q, K, device="cpu")
WINDOW = create_block_mask(and_masks(_causal, _near), None, None, Q, K, device="cpu")
EMPTY = create_block_mask(lambda b, h, i, j: (b == 0) & (j < 4), 2, None, Q, K, device="cpu")


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=CAUSAL)


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(
        q, k, v, score_mod=lambda s, b, h, i, j: 20 * torch.tanh(s / 20), block_mask=WINDOW, scale=0.5
    )


def _branch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask inside the score function."""
    return flex_attention(
        q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")), block_mask=WINDOW
    )


def _table(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[b, h, i, j], block_mask=CAUSAL)


def _made_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The block mask is made with the model, by functions under `vmap` that write in place."""
    block = create_block_mask(and_masks(_causal, _near), None, None, Q, K, device="cpu")
    return flex_attention(q, k, v, block_mask=block)


def _row(name: str, run: Callable[..., Tensor], spec: str, **more: Any) -> Spelling:
    """`flex_attention` has no gradient on a CPU."""
    return Spelling(name, run, spec, gradients=False, **more)


ROWS = (
    _row("flex_causal", lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL), f"{ROOT}; keep k <= q (empty row: zero)"),
    _row("flex_alibi", _alibi, f"{ROOT} + (k - q)*bias[h]; keep k <= q (empty row: zero)", extra=(ramp(4),)),
    _row("flex_soft_cap", _capped, "4 heads, d=8; score 20*tanh(s/40); keep k <= q and q <= k + 2 (empty row: zero)"),
    _row("flex_where", _branch, f"{ROOT}; keep k <= q and q <= k + 2 (empty row: zero)"),
    _row("flex_empty_rows", lambda q, k, v: flex_attention(q, k, v, block_mask=EMPTY), f"{ROOT}; keep b == 0 and k <= 3 (empty row: zero)"),
    _row("flex_grouped", lambda q, k, v: flex_attention(q, k, v, block_mask=CAUSAL, enable_gqa=True), "4/2 heads, d=8; score 0.353553*s; keep k <= q (empty row: zero)", shapes=GROUPED),
    _row("flex_mask_within", _made_within, f"{ROOT}; keep k <= q and q <= k + 2 (empty row: zero)"),
    _row("flex_bias", _table, f"{ROOT} + bias[b, h, q, k]; keep k <= q (empty row: zero)", extra=(ramp(2, 4, Q, K),)),
)  # fmt: skip
