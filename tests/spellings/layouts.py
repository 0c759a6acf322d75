"""Where heads, queries, keys and values lie: fused projections, groups, chunks, views as `einops` makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import GROUPED, SQUARE, K, Q, Spelling, attend

PLAIN = "4 heads, d=8; score s"
FUSED = ((2, 7, 96),)


def _heads(x: Tensor) -> Tensor:
    return x.view(2, 7, 4, 8).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 7, 32)


def _chunk(x: Tensor) -> Tensor:
    q, k, v = map(_heads, x.chunk(3, -1))
    return _merge(attend(q @ k.mT, v))


def _split(x: Tensor) -> Tensor:
    q, k, v = (_heads(t) for t in torch.split(x, 32, dim=2))
    return _merge(attend(q @ k.mT, v))


def _split_sizes(x: Tensor) -> Tensor:
    """Grouped: four heads of queries, two of keys and two of values."""
    q, k, v = x[..., :64].split([32, 16, 16], -1)
    k, v = (t.view(2, 7, 2, 8).transpose(1, 2).repeat_interleave(2, 1) for t in (k, v))
    return _merge(attend(_heads(q) @ k.mT, v))


def _slices(x: Tensor) -> Tensor:
    q, k, v = (_heads(t) for t in (x[..., :32], x[..., 32:64], x[..., 64:]))
    return _merge(attend(q @ k.mT, v))


def _unbind_first(x: Tensor) -> Tensor:
    q, k, v = x.view(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return _merge(attend(q @ k.mT, v))


def _timm(x: Tensor) -> Tensor:
    qkv = x.reshape(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
    return _merge(attend((qkv[0] * 0.5) @ qkv[1].transpose(-2, -1), qkv[2]))


def _unbind_middle(x: Tensor) -> Tensor:
    q, k, v = x.view(2, 7, 4, 3, 8).unbind(3)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _merge(attend(q @ k.mT, v))


def _interleaved_last(x: Tensor) -> Tensor:
    """The three lie side by side in every feature."""
    parts = x.view(2, 7, 4, 8, 3)
    q, k, v = (parts[..., i].transpose(1, 2) for i in range(3))
    return _merge(attend(q @ k.mT, v))


def _per_head(x: Tensor) -> Tensor:
    """Megatron: the three parts of each head lie together."""
    q, k, v = x.view(2, 7, 4, 24).permute(0, 2, 1, 3).chunk(3, dim=-1)
    return _merge(attend(q @ k.mT, v))


def _time_first(x: Tensor) -> Tensor:
    """Fairseq: time, batch, channels, with heads folded into the batch."""
    q, k, v = x.transpose(0, 1).chunk(3, -1)
    q, k, v = (t.contiguous().view(7, 8, 8).transpose(0, 1) for t in (q, k, v))
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return out.transpose(0, 1).contiguous().view(7, 2, 32)


def _channels_first(x: Tensor) -> Tensor:
    """An image's channels: heads by features by places."""
    q, k, v = x.transpose(1, 2).reshape(2, 3, 4, 8, 7).unbind(1)
    return torch.einsum("bhij,bhdj->bhdi", torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1), v).reshape(2, 32, 7)


def _einops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`rearrange` from "b n (h d)" to "(b h) n d" and back, by the views that it makes."""
    q, k, v = (x.reshape(2, x.shape[1], 4, 8).permute(0, 2, 1, 3).reshape(8, x.shape[1], 8) for x in (q, k, v))
    out = torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).mul(0.5).softmax(-1), v)
    return out.reshape(2, 4, Q, 8).permute(0, 2, 1, 3).reshape(2, Q, 32)


def _repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(2, 2, 2, K, 8).reshape(2, 4, K, 8) for x in (k, v))
    return attend(q @ k.mT, v)


def _tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of keys repeated as a whole: head h reads head h modulo 2."""
    return attend(q @ k.repeat(1, 2, 1, 1).mT, v.repeat(1, 2, 1, 1))


def _stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (torch.stack((x, x), 2).flatten(1, 2) for x in (k, v))
    return attend(q @ k.mT, v)


def _picked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.tensor([1, 0, 0, 1])
    return attend(q @ k[:, table].mT, v[:, table])


def _chunked_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three rows of queries at a time; the mask knows where the chunk begins."""
    parts = []
    for start in range(0, Q, 3):
        rows = torch.arange(start, min(start + 3, Q))[:, None]
        scores = q[:, :, start : start + 3] @ k.mT
        parts.append(attend(scores.masked_fill(torch.arange(K) > rows, float("-inf")), v))
    return torch.cat(parts, 2)


def _split_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(Q, K, dtype=torch.bool).tril()
    pieces = zip(q.split(4, 2), mask.split(4, 0), strict=True)
    return torch.cat([attend((x @ k.mT).masked_fill(~m, float("-inf")), v) for x, m in pieces], 2)


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
    return torch.stack([attend(a @ b.mT, c) for a, b, c in heads], 1)


def _rolled_windows(x: Tensor) -> Tensor:
    """Windows of four places, cut out by a view."""
    q, k, v = F.pad(x, (0, 0, 0, 1)).view(2, 2, 4, 3, 4, 8).permute(3, 0, 1, 4, 2, 5)
    return attend(q @ k.mT, v).transpose(2, 3).reshape(2, 8, 32)[:, :7]


def _returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.mean((1, 3), keepdim=True)


ONE = "1 heads, d=8; score s"
SHARED = "4/2 heads, d=8; score s"
ROWS = (
    Spelling("one_head", lambda q, k, v: attend(q @ k.mT, v), ONE, ((2, Q, 8), (2, K, 8), (2, K, 8))),
    Spelling("two_dimensions", lambda q, k, v: attend(q @ k.mT, v), ONE, ((Q, 8), (K, 8), (K, 8))),
    Spelling("five_dimensions", lambda q, k, v: attend(q @ k.mT, v), PLAIN, ((2, 3, 4, Q, 8), (2, 3, 4, K, 8), (2, 3, 4, K, 8)), kernel="auto"),
    Spelling("value_width", lambda q, k, v: attend(q @ k.mT, v), "4 heads, d=8/5; score s", ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 5))),
    Spelling("fused_chunk", _chunk, PLAIN, FUSED, kernel="auto"),
    Spelling("fused_split", _split, PLAIN, FUSED),
    Spelling("fused_split_sizes", _split_sizes, SHARED, FUSED),
    Spelling("fused_slices", _slices, PLAIN, FUSED),
    Spelling("fused_unbind", _unbind_first, PLAIN, FUSED),
    Spelling("fused_timm", _timm, "4 heads, d=8; score s/2", FUSED),
    Spelling("fused_between", _unbind_middle, PLAIN, FUSED),
    Spelling("fused_interleaved", _interleaved_last, PLAIN, FUSED),
    Spelling("fused_per_head", _per_head, PLAIN, FUSED),
    Spelling("fused_time_first", _time_first, PLAIN, FUSED),
    Spelling("fused_channels_first", _channels_first, PLAIN, FUSED),
    Spelling("einops", _einops, "4 heads, d=8; score s/2", ((2, Q, 32), (2, K, 32), (2, K, 32)), kernel="auto"),
    Spelling("repeat_kv", _repeat_kv, SHARED, GROUPED, kernel="auto"),
    Spelling("repeat_interleave", lambda q, k, v: attend(q @ k.repeat_interleave(2, 1).mT, v.repeat_interleave(2, 1)), SHARED, GROUPED),
    Spelling("heads_tiled", _tiled, "4/2 heads, d=8, head table; score s", GROUPED),
    Spelling("heads_stacked", _stacked, SHARED, GROUPED),
    Spelling("heads_picked", _picked, PLAIN, GROUPED),
    Spelling("multi_query", lambda q, k, v: attend(q @ k.mT, v), "4/1 heads, d=8; score s", ((2, 4, Q, 8), (2, 1, K, 8), (2, 1, K, 8)), kernel="auto"),
    Spelling("shared_batch", lambda q, k, v: attend(q @ k.mT, v), PLAIN, ((2, 4, Q, 8), (1, 4, K, 8), (1, 4, K, 8))),
    Spelling("chunked_rows", _chunked_rows, (f"{PLAIN}; keep k <= q (empty row: nan)", f"{PLAIN}; keep k <= q + 3 (empty row: nan)", f"{PLAIN}; keep k <= 6 (empty row: nan)")),
    Spelling("split_rows", _split_rows, (f"{PLAIN}; keep k <= q (empty row: nan)", f"{PLAIN}; keep k <= q + 4 (empty row: nan)")),
    Spelling("one_head_at_a_time", _by_head, (ONE,) * 4),
    Spelling("windows_by_view", _rolled_windows, PLAIN, FUSED),
    Spelling("weights_also_averaged", _returned, PLAIN),
    Spelling("query_reused", lambda q: attend(q @ q.mT, q), PLAIN, SQUARE[:1]),
)  # fmt: skip
