"""Attention within a window, computed on overlapping chunks: scores by distance or by chunk instead of by key."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import Spelling

W, LENGTH = 2, 12
QKV = ((2, 3, LENGTH, 4),) * 3
PADDED = torch.tensor([[0.0] * LENGTH, [0.0] * 7 + [-1.0] * 5])


def overlapping(x: Tensor, w: int = W, early: int = 0) -> Tensor:
    """[n, length, width] as chunks of 2w that overlap by w and `early` more."""
    x = x.reshape(x.shape[0], x.shape[1] // (2 * w), 2 * w, x.shape[2])
    stride = list(x.stride())
    stride[1] = stride[1] // 2 - early * stride[2]
    return x.as_strided((x.shape[0], 2 * x.shape[1] - 1, *x.shape[2:]), stride)


def unfolded(x: Tensor) -> Tensor:
    """`overlapping` without strides."""
    return x.unfold(1, 2 * W, W).transpose(2, 3)


def sheared(
    q: Tensor, k: Tensor, corners: tuple[bool, bool] = (True, True), below: bool = True,
    chunks: Callable[[Tensor], Tensor] = overlapping,
) -> Tensor:  # fmt: skip
    """Scores [b, h, q, distance] by Longformer's way: products of chunks whose diagonals a pad turns into columns."""
    b, h, n, _ = q.shape
    products = torch.einsum("bcxd,bcyd->bcxy", overlapping(q.flatten(0, 1)), chunks(k.flatten(0, 1)))
    products = F.pad(products, (0, 0, 0, 1))
    products = products.view(*products.shape[:2], products.shape[3], products.shape[2])
    out = products.new_zeros(b * h, n // W, W, 2 * W + 1)
    out[:, :-1, :, W:] = products[:, :, :W, : W + 1]
    out[:, -1, :, W:] = products[:, -1, W:, : W + 1]
    if below:
        out[:, 1:, :, :W] = products[:, :, -(W + 1) : -1, W + 1 :]
    out[:, 0, 1:W, 1:W] = products[:, 0, : W - 1, 1 - W :]
    out = out.view(b, h, n, 2 * W + 1)
    corner = out.new_ones(W, W + 1).tril().flip(0).bool()
    if corners[0]:
        out[:, :, :W, : W + 1] = out[:, :, :W, : W + 1].masked_fill(corner, -math.inf)
    if corners[1]:
        out[:, :, -W:, -(W + 1) :] = out[:, :, -W:, -(W + 1) :].masked_fill(corner.flip((0, 1)), -math.inf)
    return out


def gathered(weights: Tensor, v: Tensor, shift: int = 0) -> Tensor:
    """Weights [b, h, q, distance] over values [b, h, k, d], columns turned into diagonals of chunks of values."""
    b, h, n, d = v.shape
    padded = F.pad(v.reshape(b * h, n, d), (0, 0, W + shift, W - shift), value=-1.0)
    chunks = padded.as_strided((b * h, n // W, 3 * W, d), ((n + 2 * W) * d, W * d, d, 1))
    weights = F.pad(weights.reshape(b * h, n // W, W, 2 * W + 1), (0, W + 1)).view(b * h, n // W, -1)
    weights = weights[:, :, :-W].view(b * h, n // W, W, 3 * W + 1)[:, :, :, :-1]
    return torch.einsum("bcwd,bcdh->bcwh", weights, chunks).view(b, h, n, d)


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Longformer: masked keys by the same products, of ones and a fill, and rows of masked queries as zeros."""
    gone = (mask != 0)[:, None, :, None]
    fill = gone.type_as(q).masked_fill(gone, torch.finfo(q.dtype).min)
    scores = sheared(q / 2, k) + sheared(fill.new_ones(fill.shape), fill)
    return gathered(scores.softmax(-1).masked_fill(gone, 0.0), v)


def _scaled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A factor and a bias by distance on the scores in their columns."""
    return gathered((sheared(q, k) * 0.5 + bias).softmax(-1), v)


BAND = "3 heads, d=4; score {}; keep k <= q + 2 and q <= k + 2 (empty row: nan)"
ROWS = (
    Spelling("sliding_chunks", lambda q, k, v: gathered(sheared(q, k).softmax(-1), v), BAND.format("s"), QKV, kernel="auto"),
    Spelling("sliding_chunks_padded", _padded, BAND.format("s/2 + where(bias[b, k] == 0, 0, -3.40282e+38)") + "; gate where(bias[b, q] == 0, 1, 0)", QKV, (PADDED,), gradients=False),
    Spelling("sliding_chunks_biased", _scaled, BAND.format("s/2 + bias[k - q + 2]"), QKV, (torch.linspace(-1, 1, 2 * W + 1),)),
    Spelling("sliding_chunks_unfolded", lambda q, k, v: gathered(sheared(q, k, chunks=unfolded).softmax(-1), v), BAND.format("s"), QKV),
    Spelling("sliding_chunks_shared", lambda q, k, v: gathered(sheared(q, k.expand(q.shape)).softmax(-1), v.expand(q.shape)), BAND.format("s").replace("3 heads", "3/1 heads"), (QKV[0], *((2, 1, LENGTH, 4),) * 2)),
)  # fmt: skip
