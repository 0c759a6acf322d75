"""Forms that are seen now and then: other operators for the same views, products and functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import GROUPED, LAST, NEG_INF, PAD_ROWS, K, Q, Spelling, attend, ramp

PLAIN = "4 heads, d=8; score s"
FLAT = ((Q, 8), (K, 8), (K, 8))
ONE = "1 heads, d=8; score s"


def _exp2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Base two, as kernels write it."""
    scores = q @ k.mT * math.log2(math.e)
    exps = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return exps / exps.sum(-1, keepdim=True) @ v


def _outer(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(torch.outer(rows, columns) == 0, NEG_INF), v)


def _addcmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return attend(torch.addcmul(bias, q @ k.mT, gain[:, None, None], value=0.5), v)


def _local_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query sees the window of keys that `unfold` cuts out around it."""
    k, v = (x.unfold(2, 3, 1) for x in (k, v))
    weights = torch.einsum("bhqd,bhqdk->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhqdk->bhqd", weights, v)


def _blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks of four places, each with itself and its neighbour before."""
    q, k, v = (x.reshape(2, 4, 2, 4, 8) for x in (q, k, v))
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), 3) for x in (k, v))
    return attend(q @ k.mT, v).reshape(2, 4, 8, 8)


def _axial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention along the rows of a grid of two by four."""
    q, k, v = (x.view(2, 4, 2, 4, 8) for x in (q, k, v))
    return attend(q @ k.mT, v).flatten(2, 3)


def _beit(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A table for the places of an image, and three more rows for the first token."""
    index = torch.zeros(7, 7, dtype=torch.long)
    index[1:, 1:] = torch.arange(6)[:, None] - torch.arange(6) + 5
    index[0, :], index[:, 0], index[0, 0] = 11, 12, 13
    bias = F.embedding(index.view(-1), table).view(7, 7, 4).permute(2, 0, 1).contiguous()
    return attend(q @ k.mT + bias[None], v)


def _two_masks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """One mask by fill, one by sum."""
    causal = torch.full((Q, K), NEG_INF).triu(1)
    return attend((q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF) + causal, v)


def _log_mask_exp(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF)
    return torch.exp(F.log_softmax(scores, dim=-1)) @ v


def _loop_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([attend(a @ b.mT, c) for a, b, c in zip(q, k, v, strict=True)])


def _cached(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Tensor:
    k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
    return attend(q @ k.mT, v)


def _flat_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The softmax over rows of a matrix."""
    return (q @ k.mT).reshape(-1, K).softmax(-1).view(2, 4, Q, K) @ v


def _heads_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bqhk", q, k).softmax(-1)
    return torch.einsum("bqhk,bkhd->bqhd", weights, v)


def _heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bqkh", q, k).softmax(2)
    return torch.einsum("bqkh,bkhd->bqhd", weights, v)


def _float_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(mask[:, None, None] == 0, NEG_INF), v)


def _multiplied_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    kept = pad[:, None, None].to(q.dtype)
    return attend((q @ k.mT) * kept + (1 - kept) * -1e9, v)


def _subtracted_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(q @ k.mT - (1 - pad[:, None, None].to(q.dtype)) * 1e4, v)


def _half_of_the_minimum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend(torch.where(pad[:, None, None], q @ k.mT, torch.finfo(q.dtype).min / 2), v)


def _grid_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores by row and column of a grid of keys, flattened for the softmax."""
    scores = torch.einsum("bhqd,bhxyd->bhqxy", q, k.view(2, 4, 3, 3, 8))
    return torch.einsum("bhqk,bhkd->bhqd", scores.flatten(-2).softmax(-1), v)


def _pooled(k: Tensor, v: Tensor, probe: Tensor) -> Tensor:
    """One learned query for the whole sequence."""
    return torch.einsum("bk,bkd->bd", torch.einsum("d,bkd->bk", probe, k).softmax(-1), v)


def _matrix_vector(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(k, q.unsqueeze(-1)).squeeze(-1).softmax(-1)
    return torch.matmul(weights.unsqueeze(1), v).squeeze(1)


EIGHT = ((2, 4, 8, 8),) * 3
ROWS = (
    Spelling("exp2", _exp2, "4 heads, d=8; score 1*s"),
    Spelling("inner", lambda q, k, v: torch.inner(q, k).softmax(-1).mm(v), ONE, FLAT),
    Spelling("numpy_transpose", lambda q, k, v: (q @ k.T).softmax(1) @ v, ONE, FLAT),
    Spelling("swapdims", lambda q, k, v: attend(q @ k.swapdims(-1, -2), v), PLAIN),
    Spelling("tile", lambda q, k, v: attend(q @ k.tile(1, 2, 1, 1).mT, v.tile((2, 1, 1))), "4/2 heads, d=8, head table; score s", GROUPED),
    Spelling("outer", _outer, f"{PLAIN}; keep mask[k]*mask2[q] != 0 (empty row: nan)", extra=(torch.ones(Q, dtype=torch.long), torch.tensor([1] * 6 + [0] * 3))),
    Spelling("addcmul", _addcmul, "4 heads, d=8; score s*bias2[h]/2 + bias[h, q, k]", extra=(ramp(4, Q, K), ramp(4))),
    Spelling("clamped", lambda q, k, v: attend((q @ k.mT).clamp(-5, 5), v), "4 heads, d=8; score minimum(maximum(s, -5), 5)"),
    Spelling("local_windows", _local_windows, "7 heads, d=8; score s", ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 8))),
    Spelling("blocks", _blocks, "2 heads, d=8; score s", EIGHT),
    Spelling("axial", _axial, "2 heads, d=8; score s", EIGHT),
    Spelling("beit", _beit, f"{PLAIN} + bias[h, q, k]", ((2, 4, 7, 8),) * 3, extra=(ramp(14, 4),)),
    Spelling("two_masks", _two_masks, f"{PLAIN}; keep k <= q and mask[b, k] (empty row: nan)", extra=(PAD_ROWS,)),
    Spelling("log_softmax_masked", _log_mask_exp, f"{PLAIN}; keep mask[b, k] (empty row: nan)", extra=(PAD_ROWS,)),
    Spelling("loop_over_batch", _loop_over_batch, (ONE, ONE)),
    Spelling("cache", _cached, PLAIN, ((2, 4, 1, 8), (2, 4, 1, 8), (2, 4, 1, 8)), extra=(ramp(2, 4, 6, 8), ramp(2, 4, 6, 8))),
    Spelling("flat_rows", _flat_rows, PLAIN),
    Spelling("heads_late", _heads_late, PLAIN, LAST),
    Spelling("heads_last", _heads_last, PLAIN, LAST),
    Spelling("float_mask", _float_mask, f"{PLAIN}; keep bias[b, k] != 0 (empty row: nan)", extra=(PAD_ROWS.float(),)),
    Spelling("multiplied_mask", _multiplied_mask, f"{PLAIN}*where(mask[b, k], 1, 0) + where(mask[b, k], 0, -1e+09)", extra=(PAD_ROWS,)),
    Spelling("subtracted_mask", _subtracted_mask, f"{PLAIN} + where(mask[b, k], 0, -10000)", extra=(PAD_ROWS,)),
    Spelling("half_of_the_minimum", _half_of_the_minimum, f"{PLAIN}; keep mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
    Spelling("grid_of_keys", _grid_of_keys, PLAIN),
    Spelling("learned_queries", lambda q, k, v: attend(q.expand(2, -1, -1, -1) @ k.mT, v), PLAIN, ((1, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 8))),
    Spelling("shared_values", lambda q, k, v: torch.matmul((q @ k.mT).softmax(-1), v), "4/4/1 heads, d=8; score s", ((2, 4, Q, 8), (2, 4, K, 8), (K, 8))),
    Spelling("pooled", _pooled, ONE, ((2, K, 8), (2, K, 8), (8,))),
    Spelling("matrix_vector", _matrix_vector, ONE, ((2, 8), (2, K, 8), (2, K, 8))),
    Spelling("gated_heads", lambda q, k, v, g: (g.sigmoid()[:, None, None] * (q @ k.mT).softmax(-1)) @ v, f"{PLAIN}; gate bias[h]", extra=(ramp(4),)),
)  # fmt: skip
