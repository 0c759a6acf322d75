"""Masks in every spelling: causal, windows, padding, documents, prefixes, blocks, by fill, sum, product or choice."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.spellings.row import MIN, NEG_INF, PAD, PAD_ROWS, SQUARE, K, Q, Spelling, attend

PLAIN = "4 heads, d=8; score s"
CAUSAL = f"{PLAIN}; keep k <= q (empty row: nan)"
PADDED = f"{PLAIN}; keep mask[b, k] (empty row: nan)"
LENGTHS = torch.tensor([9, 4])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4, 4]])


def _nano_gpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tril = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    return attend((q @ k.mT).masked_fill(tril[:, :, :Q, :K] == 0, NEG_INF), v)


class Buffered(torch.nn.Module):
    """A causal buffer that is larger than the sequence, as nanoGPT and GPT-2 hold one."""

    def __init__(self, dtype: torch.dtype, fill: float) -> None:
        super().__init__()
        self.fill = fill
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16).to(dtype), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention under the lower right part of the buffer."""
        n_q, n_k = q.shape[-2], k.shape[-2]
        mask = self.mask[:, :, n_k - n_q : n_k, :n_k]
        scores = q @ k.mT
        if mask.dtype == torch.bool:
            return attend(torch.where(mask, scores, torch.full([], self.fill, dtype=scores.dtype)), v)
        return attend(scores.masked_fill(mask == 0, self.fill), v)


def _triu_bool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(torch.ones(Q, K, dtype=torch.bool).triu(1), NEG_INF), v)


def _triu_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q @ k.mT + torch.triu(torch.full((Q, K), NEG_INF), diagonal=1), v)


def _fill_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.empty(Q, K, dtype=q.dtype).fill_(NEG_INF).triu_(1)
    return attend(torch.baddbmm(mask.expand(8, Q, K), q.flatten(0, 1), k.flatten(0, 1).mT), v.flatten(0, 1)).view(
        2, 4, Q, 8
    )


def _arange(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(Q).unsqueeze(-1), torch.arange(K).unsqueeze(0)
    return attend(torch.where(i >= j, q @ k.mT, NEG_INF), v)


def _additive_one_minus(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tril(torch.ones(Q, K))
    return attend(q @ k.mT + (1.0 - mask) * MIN, v)


def _multiply_and_subtract(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 of 2019: scores times the mask, less 1e10 elsewhere."""
    mask = torch.tril(torch.ones(Q, K))
    return attend((q @ k.mT) * mask - 1e10 * (1 - mask), v)


def _lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(Q, K, dtype=torch.bool).tril(diagonal=K - Q)
    return attend((q @ k.mT).masked_fill(mask.logical_not(), NEG_INF), v)


def _cache_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries at places 2 and on, as behind a cache."""
    cache_position = torch.arange(2, 2 + Q)
    mask = torch.full((Q, K), MIN) * (torch.arange(K) > cache_position.reshape(-1, 1))
    return attend(q @ k.mT + mask[None, None], v)


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gap = torch.arange(Q)[:, None] - torch.arange(K)
    return attend(torch.where((gap >= 0) & (gap < 3), q @ k.mT, MIN), v)


def _window_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gap = (torch.arange(Q)[:, None] - torch.arange(K)).abs()
    return attend((q @ k.mT).masked_fill(gap > 2, NEG_INF), v)


def _band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A window cut out of ones by two triangles."""
    ones = torch.ones(Q, K)
    mask = torch.tril(torch.triu(ones, -1), 1)
    return attend((q @ k.mT).masked_fill(mask.bool().logical_not(), NEG_INF), v)


def _dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gap = torch.arange(Q)[:, None] - torch.arange(K)
    return attend((q @ k.mT).masked_fill(~((gap >= 0) & (gap % 2 == 0)), NEG_INF), v)


def _chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama 4: causal within chunks of three places."""
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    return attend((q @ k.mT).masked_fill(~((i // 3 == j // 3) & (j <= i)), NEG_INF), v)


def _two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Neighbours on a grid that is four places wide."""
    i, j = torch.arange(Q), torch.arange(K)
    rows, columns = i[:, None] // 4 - j // 4, i[:, None] % 4 - j % 4
    return attend((q @ k.mT).masked_fill((rows.abs() > 1) | (columns.abs() > 1), NEG_INF), v)


def _prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    return attend((q @ k.mT).masked_fill(~((j <= i) | (j < 4)), NEG_INF), v)


def _prefix_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    i, j = torch.arange(Q)[:, None], torch.arange(K)
    keep = (j <= i) | (j < lengths[:, None, None, None])
    return attend((q @ k.mT).masked_fill(~keep, NEG_INF), v)


def _lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.arange(K)[None, :] < lengths[:, None]
    return attend((q @ k.mT).masked_fill(~mask[:, None, None, :], NEG_INF), v)


def _causal_padding(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = torch.ones(Q, K, dtype=torch.bool).tril() & pad[:, None, None]
    return attend((q @ k.mT).masked_fill(~mask, MIN), v)


def _documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, :, None] == ids[:, None, :]
    return attend((q @ k.mT).masked_fill(~same[:, None], NEG_INF), v)


def _documents_causal(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, None, :, None].eq(ids[:, None, None, :])
    order = torch.ones(Q, Q, dtype=torch.bool).tril()
    return attend((q @ k.mT).masked_fill((same & order).logical_not(), NEG_INF), v)


def _regions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A region number written into slices of zeros, as shifted windows make it."""
    region = torch.zeros(Q)
    region[3:] = 1
    return attend(q @ k.mT + torch.where(region[:, None] == region[None, :], 0.0, NEG_INF), v)


def _mask_in_place(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(~pad[:, None, None, :], NEG_INF)
    return attend(scores, v)


def _additive(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = (1.0 - pad[:, None, None, :].float()) * MIN
    return attend(q @ k.mT + mask, v)


def _bert(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = pad[:, None, None, :].to(q.dtype)
    return attend(q @ k.mT + (1.0 - mask) * torch.finfo(q.dtype).min, v)


def _inverted(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    inverted = 1.0 - pad[:, None, None, :].to(torch.float32)
    return attend(q @ k.mT + inverted.masked_fill(inverted.to(torch.bool), MIN), v)


def _log(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q @ k.mT + pad[:, None, None].to(q.dtype).log(), v)


def _integer_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(pad.to(torch.int64).unsqueeze(1).unsqueeze(2) == 0, -1e9), v)


def _outer(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Padding of queries and keys as a product of the two."""
    pair = pad[:, :Q, None] * pad[:, None, :]
    return attend((q @ k.mT).masked_fill(~pair[:, None], MIN), v)


def _assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of later keys set by an index."""
    scores = q @ k.mT
    scores[..., 6:] = NEG_INF
    return attend(scores, v)


ROWS = (
    Spelling("causal_buffer_of_the_trace", _nano_gpt, CAUSAL, kernel="auto"),
    Spelling("causal_buffer_float", Buffered(torch.float32, NEG_INF), f"{PLAIN}; keep k <= q + 2 (empty row: nan)"),
    Spelling("causal_buffer_bool", Buffered(torch.bool, MIN), f"{PLAIN}; keep k <= q + 2 (empty row: uniform)"),
    Spelling("causal_buffer_byte", Buffered(torch.uint8, -1e9), "4 heads, d=8; score where(q + 3 <= k, -1e+09, s)"),
    Spelling("causal_triu_bool", _triu_bool, CAUSAL),
    Spelling("causal_triu_full", _triu_full, CAUSAL),
    Spelling("causal_triu_baddbmm", _fill_triu, CAUSAL),
    Spelling("causal_arange", _arange, CAUSAL, kernel="auto"),
    Spelling("causal_one_minus", _additive_one_minus, f"{PLAIN}; keep k <= q (empty row: uniform)"),
    Spelling("causal_multiplied", _multiply_and_subtract, "4 heads, d=8; score s*where(k <= q, 1, 0) + where(k <= q, 0, -1e+10)"),
    Spelling("causal_lower_right", _lower_right, f"{PLAIN}; keep k <= q + 2 (empty row: nan)"),
    Spelling("causal_cache_position", _cache_positions, f"{PLAIN}; keep k <= q + 2 (empty row: uniform)"),
    Spelling("window", _window, f"{PLAIN}; keep k <= q and q <= k + 2 (empty row: uniform)", kernel="auto"),
    Spelling("window_both_sides", _window_both, f"{PLAIN}; keep abs(k - q) <= 2 (empty row: nan)"),
    Spelling("window_band", _band, f"{PLAIN}; keep k <= q + 1 and q <= k + 1 (empty row: nan)"),
    Spelling("dilated", _dilated, f"{PLAIN}; keep (q - k) % 2 == 0 and k <= q (empty row: nan)"),
    Spelling("chunked_causal", _chunked, f"{PLAIN}; keep k <= q and q//3 == k//3 (empty row: nan)"),
    Spelling("window_two_dimensions", _two_dimensions, f"{PLAIN}; keep abs(k % 4 - q % 4) <= 1 and abs(k//4 - q//4) <= 1 (empty row: nan)"),
    Spelling("prefix", _prefix, f"{PLAIN}; keep k <= 3 or k <= q (empty row: nan)"),
    Spelling("prefix_lengths", _prefix_lengths, f"{PLAIN}; keep k <= q or k < mask[b] (empty row: nan)", extra=(LENGTHS,)),
    Spelling("padding", lambda q, k, v, pad: attend((q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF), v), PADDED, extra=(PAD_ROWS,), kernel="auto"),
    Spelling("padding_in_place", _mask_in_place, PADDED, extra=(PAD,)),
    Spelling("padding_lengths", _lengths, f"{PLAIN}; keep k < mask[b] (empty row: nan)", extra=(LENGTHS,)),
    Spelling("padding_causal", _causal_padding, f"{PLAIN}; keep k <= q and mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("padding_additive", _additive, f"{PLAIN}; keep mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,), kernel="auto"),
    Spelling("padding_bert", _bert, f"{PLAIN}; keep mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("padding_inverted", _inverted, f"{PLAIN}; keep mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("padding_logarithm", _log, PADDED, extra=(PAD_ROWS,)),
    Spelling("padding_integers", _integer_mask, "4 heads, d=8; score where(mask[b, k], s, -1e+09)", extra=(PAD_ROWS,)),
    Spelling("padding_outer", _outer, f"{PLAIN}; keep ids[b, k] and ids[b, q] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("padding_assigned", _assigned, f"{PLAIN}; keep k <= 5 (empty row: nan)"),
    Spelling(
        "minus_ten_thousand", lambda q, k, v, pad: attend(q @ k.mT + torch.where(pad[:, None, None], 0.0, -1e4), v),
        f"{PLAIN} + where(mask[b, k], 0, -10000)", extra=(PAD_ROWS,),
    ),
    Spelling("documents", _documents, f"{PLAIN}; keep ids[b, q] == ids[b, k] (empty row: nan)", SQUARE, extra=(DOCUMENTS,), kernel="auto"),
    Spelling("documents_causal", _documents_causal, f"{PLAIN}; keep k <= q and ids[b, q] == ids[b, k] (empty row: nan)", SQUARE, extra=(DOCUMENTS,)),
    Spelling("regions", _regions, f"{PLAIN}; keep where(3 <= k, -1, 0) + where(3 <= q, 1, 0) == 0 (empty row: nan)", SQUARE),
)  # fmt: skip
