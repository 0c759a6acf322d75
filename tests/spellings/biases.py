"""What is added to the scores: positions in every spelling, second products, tables, pair features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import BIAS, NEG_INF, K, Q, Spelling, attend, ramp

PLAIN = "4 heads, d=8; score s"
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
WINDOW = ((6, 4, 4, 8),) * 3


def _alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(K)[None, :] - torch.arange(Q)[:, None]
    return attend(q @ k.mT / 2 + SLOPES[:, None, None] * distance, v)


def _alibi_keys(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """BLOOM: the slope times the place of the key, by `baddbmm`."""
    alibi = (slopes[:, None] * torch.arange(K)).repeat(2, 1)[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(alibi.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=0.5).softmax(-1), v).view(2, 4, Q, 8)


def _alibi_padding(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, pad: Tensor) -> Tensor:
    """BLOOM with padding: places count kept keys."""
    places = ((pad.cumsum(-1) - 1) * pad)[:, None, :]
    alibi = (slopes[:, None] * places).unsqueeze(2)
    return attend((q @ k.mT + alibi).masked_fill(~pad[:, None, None].bool(), NEG_INF), v)


def _alibi_symmetric(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = (torch.arange(Q)[:, None] - torch.arange(K)).abs()
    return attend(q @ k.mT - slopes.view(1, 4, 1, 1) * distance, v)


def _t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    gap = torch.arange(K)[None, :] - torch.arange(Q)[:, None]
    buckets = (gap > 0).to(torch.long) * 8
    gap = gap.abs()
    large = 4 + (torch.log(gap.float() / 4) / math.log(32) * 4).to(torch.long)
    buckets = buckets + torch.where(gap < 4, gap, torch.min(large, torch.full_like(large, 7)))
    return attend(q @ k.mT + F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0), v)


def _swin_index() -> Tensor:
    coords = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    gap = (coords[:, :, None] - coords[:, None]).permute(1, 2, 0) + 1
    return gap[..., 0] * 3 + gap[..., 1]


def _swin(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Six windows of two by two places; the table is read at a constant index."""
    bias = table[_swin_index().view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    return attend(q @ k.mT + bias.unsqueeze(0), v)


def _product_index(q: Tensor, k: Tensor, v: Tensor, table: Tensor, first: int = 0) -> Tensor:
    """RegionViT: the table's index is a sum of products of integers; a region token before has no bias."""
    places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    gap = places[:, :, None] - places[:, None, :] + 1
    index = (gap * torch.tensor([1, 3])[:, None, None]).sum(dim=0)
    bias = F.embedding(index, table).permute(2, 0, 1)[None]
    return attend(torch.einsum("bhid,bhjd->bhij", q, k) + F.pad(bias, (first, 0, first, 0)), v)


def _swin_shifted(q: Tensor, k: Tensor, v: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    """A mask for each of three windows, the batch folded around them."""
    bias = table[_swin_index().view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    scores = q @ k.mT + bias.unsqueeze(0)
    scores = scores.view(2, 3, 4, 4, 4) + mask.unsqueeze(1).unsqueeze(0)
    return attend(scores.view(-1, 4, 4, 4), v)


def _levit(q: Tensor, k: Tensor, v: Tensor, biases: Tensor) -> Tensor:
    index = (torch.arange(Q)[:, None] - torch.arange(K)).abs()
    return attend(q @ k.mT * 0.5 + biases[:, index], v)


def _indexed_by_data(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Graphormer: a table read at a distance that comes with the input."""
    return attend(q @ k.mT + F.embedding(ids, table).permute(0, 3, 1, 2), v)


def _pair(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, weight: Tensor) -> Tensor:
    """AlphaFold: pair features through a linear map to one bias per head."""
    return attend(q @ k.mT + torch.einsum("bijc,ch->bhij", pair, weight), v)


def _deberta(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Content to place and place to content, gathered by relative place."""
    place = (torch.arange(Q)[:, None] - torch.arange(Q) + 4).clamp(0, 7).expand(2, 4, Q, Q)
    c2p = torch.gather(q @ keys.mT, -1, place)
    p2c = torch.gather(k @ queries.mT, -1, place).mT
    return attend((q @ k.mT + c2p + p2c) / math.sqrt(24), v)


def _shifted(x: Tensor) -> Tensor:
    """Transformer-XL's `rel_shift`."""
    b, h, i, j = x.shape
    x = F.pad(x, (1, 0)).view(b, h, j + 1, i)
    return x[:, :, 1:].reshape(b, h, i, j)


def _transformer_xl(q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor) -> Tensor:
    content = (q + u[:, None]) @ k.mT
    places = _shifted((q + w[:, None]) @ r.mT)
    return attend((content + places) * 0.25, v)


def _music(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """The skew of the Music Transformer."""
    relative = F.pad(q @ r.mT, (1, 0)).reshape(2, 4, Q + 1, Q)[:, :, 1:]
    scores = (q @ k.mT + relative) / math.sqrt(8)
    return attend(scores.masked_fill(torch.ones(Q, Q).triu(1).bool(), NEG_INF), v)


def _decomposed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """SAM and ViTDet: one bias by rows and one by columns of a grid of two by three."""
    grid = q.reshape(8, 2, 3, 8)
    by_row = torch.einsum("bhwc,hkc->bhwk", grid, rows)
    by_column = torch.einsum("bhwc,wkc->bhwk", grid, columns)
    scores = (q.flatten(0, 1) * 0.5) @ k.flatten(0, 1).transpose(-2, -1)
    scores = scores.view(8, 2, 3, 2, 3) + by_row[..., :, None] + by_column[..., None, :]
    return (scores.view(8, 6, 6).softmax(-1) @ v.flatten(0, 1)).view(2, 4, 6, 8)


def _relative_keys(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Shaw: an embedding for every pair of places, multiplied with the query."""
    place = torch.arange(Q)[:, None] - torch.arange(Q) + Q - 1
    return attend((q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, table[place])) / 4, v)


def _differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Minus the squared distance: keys' own products are a bias of the key."""
    return attend(2 * (q @ k.mT) - (k * k).sum(-1)[..., None, :] - (q * q).sum(-1, keepdim=True), v)


def _decay(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Forgetting attention: differences of cumulated log gates."""
    total = gates.sigmoid().log().cumsum(-1)
    scores = q @ k.mT + total[..., :, None] - total[..., None, :]
    return attend(scores.masked_fill(torch.ones(Q, Q).triu(1).bool(), NEG_INF), v)


EIGHT = ((2, 4, Q, 8),) * 3
SIX = ((2, 4, 6, 8),) * 3
ROWS = (
    Spelling("bias_dense", lambda q, k, v, bias: attend(q @ k.mT + bias, v), f"{PLAIN} + bias[h, q, k]", extra=(BIAS,), kernel="auto"),
    Spelling("bias_by_pair", lambda q, k, v, bias: attend(q @ k.mT + bias[:, None], v), f"{PLAIN} + bias[b, q, k]", extra=(ramp(2, Q, K),)),
    Spelling("bias_by_key", lambda q, k, v, bias: attend(q @ k.mT + bias[:, None, None], v), f"{PLAIN} + bias[b, k]", extra=(ramp(2, K),)),
    Spelling("bias_before_scale", lambda q, k, v, bias: attend((q @ k.mT + bias) / 4, v), f"{PLAIN}/4 + bias[h, q, k]/4", extra=(BIAS,)),
    Spelling("alibi", _alibi, "4 heads, d=8; score s/2 + (k - q)*bias[h]", kernel="auto"),
    Spelling("alibi_keys", _alibi_keys, "4 heads, d=8; score s/2 + k*bias[h]", extra=(SLOPES,)),
    Spelling("alibi_padding", _alibi_padding, f"{PLAIN} + (mask2[b, k] - 1)*mask[b, k]*bias[h]; keep mask[b, k] (empty row: nan)", extra=(SLOPES, torch.tensor([[1] * 9, [1] * 5 + [0] * 4]))),
    Spelling("alibi_symmetric", _alibi_symmetric, f"{PLAIN} - abs(k - q)*bias[h]", extra=(SLOPES,)),
    Spelling("t5", _t5, f"{PLAIN} + bias[h, k - q + 6]", extra=(ramp(16, 4),), kernel="auto"),
    Spelling("swin", _swin, f"{PLAIN} + bias[h, q, k]", WINDOW, extra=(ramp(9, 4),), kernel="auto"),
    Spelling("index_by_products", _product_index, f"{PLAIN} + bias[h, mask[q, k]]", WINDOW, extra=(ramp(9, 4),)),
    Spelling("index_by_products_padded", lambda q, k, v, t: _product_index(q, k, v, t, 1), f"{PLAIN} + where(1 <= k and 1 <= q and k <= 4 and q <= 4, bias[h, mask[q - 1, k - 1]], 0)", ((2, 4, 5, 8),) * 3, extra=(ramp(9, 4),), kernel="auto"),
    Spelling("swin_shifted", _swin_shifted, f"{PLAIN} + bias2[h, q, k] + bias[b % 3, q, k]", WINDOW, extra=(ramp(9, 4), ramp(3, 4, 4).sign().clamp(max=0) * 100)),
    Spelling("levit", _levit, f"{PLAIN}/2 + bias[h, abs(k - q)]", extra=(ramp(4, 9),)),
    Spelling("graphormer", _indexed_by_data, f"{PLAIN} + bias[b, h, q, k]", extra=(ramp(12, 4), (torch.arange(2 * Q * K) * 7 % 12).view(2, Q, K))),
    Spelling("pair_features", _pair, f"{PLAIN} + bias[b, h, q, k]", extra=(ramp(2, Q, K, 3), ramp(3, 4))),
    Spelling("deberta", _deberta, "4 heads, d=8; score 0.204124*s + 0.204124*bias2[b, h, q, k] + 0.204124*bias[b, h, q, k]", EIGHT, extra=(ramp(4, 8, 8), ramp(4, 8, 8, scale=0.5))),
    Spelling("transformer_xl", _transformer_xl, f"{PLAIN}/4 + bias[b, h, q, k]/4", EIGHT, extra=(ramp(4, Q, 8), ramp(4, 8), ramp(4, 8, scale=0.5))),
    Spelling("music_transformer", _music, "4 heads, d=8; score 0.353553*s + 0.353553*bias[b, h, q, k]; keep k <= q (empty row: nan)", EIGHT, extra=(ramp(4, Q, 8),)),
    Spelling("decomposed", _decomposed, "4 heads, d=8; score s/2 + bias2[4*b + h, q//3, q % 3, k % 3] + bias[4*b + h, q//3, q % 3, k//3]", SIX, extra=(ramp(2, 2, 8), ramp(3, 3, 8))),
    Spelling("relative_keys", _relative_keys, f"{PLAIN}/4 + bias[b, h, q, k]/4", EIGHT, extra=(ramp(13, 8),)),
    Spelling("squared_distance", _differences, "4 heads, d=8; score 2*s - bias2[b, h, q] - bias[b, h, k]"),
    Spelling("forgetting", _decay, f"{PLAIN} + bias[b, h, q] - bias[b, h, k]; keep k <= q (empty row: nan)", EIGHT, extra=(ramp(2, 4, Q),)),
)  # fmt: skip
