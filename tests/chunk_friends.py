"""Sliding chunks that are a step away from attention within a window: rows of false friends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.false_friends import Friend, tensor
from tests.spellings.chunks import LENGTH, W, gathered, overlapping, sheared

QKV = tuple(tensor(2, 3, LENGTH, 4, seed=seed) for seed in range(3))
OTHER, NONE, APART = "product of its own query and key", "meet no value", "not computed alike"


def _last_row_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights of the second query take the place of the first's."""
    weights = sheared(q, k).softmax(-1)
    return gathered(torch.cat([weights[:, :, 1:2], weights[:, :, 1:]], 2), v)


def _one_head_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of the first head for the second."""
    scores = sheared(q, k)
    return gathered(torch.cat([scores[:, :1], scores[:, :1], scores[:, 2:]], 1).softmax(-1), v)


def _infinite_border(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values of no key are infinite, and zero times infinity is no number."""
    b, h, n, d = v.shape
    padded = F.pad(v.reshape(b * h, n, d), (0, 0, W, W), value=torch.inf)
    chunks = padded.as_strided((b * h, n // W, 3 * W, d), ((n + 2 * W) * d, W * d, d, 1))
    weights = F.pad(sheared(q, k).softmax(-1).reshape(b * h, n // W, W, 2 * W + 1), (0, W + 1)).flatten(2)
    weights = weights[:, :, :-W].view(b * h, n // W, W, 3 * W + 1)[:, :, :, :-1]
    return torch.einsum("bcwd,bcdh->bcwh", weights, chunks).view(b, h, n, d)


def _early(x: Tensor) -> Tensor:
    """Chunks that each begin one place too early."""
    return overlapping(x, early=1)


CHUNKED = (
    Friend("chunks_that_overlap_more", lambda q, k, v: gathered(sheared(q, k, chunks=_early).softmax(-1), v), QKV, (OTHER,)),
    Friend("chunks_without_a_first_corner", lambda q, k, v: gathered(sheared(q, k, (False, True)).softmax(-1), v), QKV, (NONE,)),
    Friend("chunks_without_a_last_corner", lambda q, k, v: gathered(sheared(q, k, (True, False)).softmax(-1), v), QKV, (NONE,)),
    Friend("chunks_of_values_one_early", lambda q, k, v: gathered(sheared(q, k).softmax(-1), v, 1), QKV, (NONE,)),
    Friend("chunks_of_values_one_late", lambda q, k, v: gathered(sheared(q, k).softmax(-1), v, -1), QKV, (NONE,)),
    Friend("chunks_with_zeros_for_scores", lambda q, k, v: gathered(sheared(q, k, below=False).softmax(-1), v), QKV, (APART,)),
    Friend("chunks_of_other_keys", lambda q, k, v: gathered(sheared(q, k.roll(1, 2)).softmax(-1), v), QKV, fused=1),
    Friend("chunks_with_a_row_twice", _last_row_twice, QKV, ("not one row of the softmax",)),
    Friend("chunks_with_a_head_twice", _one_head_apart, QKV, (OTHER,)),
    Friend("chunks_in_an_infinite_border", _infinite_border, QKV, ("not finite",)),
    Friend("chunks_of_dropped_scores", lambda q, k, v: gathered(F.dropout(sheared(q, k), 0.5).softmax(-1), v), QKV, ("dropout acts on the scores",)),
)  # fmt: skip
