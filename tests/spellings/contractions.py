"""Products of queries and keys, and of weights and values, in every way to write a sum of products."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.spellings.row import GROUPED, LAST, K, Q, Spelling, attend, ramp

PLAIN = "4 heads, d=8; score s"
FLAT = ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 8))


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1), v).view(2, 4, Q, 8)


def _pair(scores: str, values: str):  # type: ignore[no-untyped-def]
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)

    return run


def _keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores as keys by queries, the softmax over the first of the two."""
    weights = torch.einsum("bhkd,bhqd->bhkq", k, q).softmax(-2)
    return torch.einsum("bhkd,bhkq->bhqd", v, weights)


def _three_operands(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, gain: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd,h->bhij", q, k, temperature).softmax(-1)
    return torch.einsum("h,bhij,bhjd->bhid", gain, weights, v)


def _masked_operand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask as an operand of the sum that applies the weights."""
    return torch.einsum("bhij,bhjd,bj->bhid", (q @ k.mT).softmax(-1), v, mask.to(v.dtype))


def _baddbmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias.repeat(2, 1, 1), q, k.transpose(1, 2), beta=0.5, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (2, 4))


def _baddbmm_empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The buffer of a `baddbmm` whose beta is zero is never read."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    buffer = torch.empty(8, Q, K, dtype=q.dtype)
    return torch.bmm(torch.baddbmm(buffer, q, k.mT, beta=0, alpha=0.125).softmax(-1), v).view(2, 4, Q, 8)


def _addmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.mm(torch.addmm(bias, q, k.t(), alpha=0.5).softmax(-1), v)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bngqd,bnkd->bngqk", q.view(2, 2, 2, Q, 8), k).softmax(-1)
    return torch.einsum("bngqk,bnkd->bngqd", weights, v).reshape(2, 4, Q, 8)


def _grouped_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as further rows of queries, with a causal mask repeated for each."""
    rows = q.reshape(2, 2, 2 * Q, 8)
    mask = torch.ones(Q, K, dtype=torch.bool).tril().repeat(2, 1)
    return attend((rows @ k.mT).masked_fill(~mask, float("-inf")), v).reshape(2, 4, Q, 8)


def _broadcast_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    return attend(q @ k[:, :, None].mT, v[:, :, None]).flatten(1, 2)


def _two_sets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two sets of keys under one softmax, each with a product of its own for scores and for values."""
    weights = torch.cat([q @ k[:, :, :4].mT, q @ k[:, :, 4:].mT], -1).softmax(-1)
    return weights[..., :4] @ v[:, :, :4] + weights[..., 4:] @ v[:, :, 4:]


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1).softmax(-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def _tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tensordot(torch.tensordot(q, k, dims=([1], [1])).softmax(-1), v, dims=1)


def _tensordot_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys shared by the whole batch, contracted over a dimension in the middle."""
    scores = torch.tensordot(q, k, dims=([-1], [-1]))
    return torch.tensordot((scores * 0.5).softmax(-1), v, dims=([-1], [0]))


ROWS = (
    Spelling("matmul", lambda q, k, v: torch.matmul(torch.matmul(q, k.transpose(-2, -1)).softmax(-1), v), PLAIN, kernel="auto"),
    Spelling("transposed_queries", lambda q, k, v: attend((k @ q.mT).mT, v), PLAIN),
    Spelling("output_transposed", lambda q, k, v: v.mT @ (k @ q.mT).softmax(-2), PLAIN),
    Spelling("swapaxes", lambda q, k, v: attend(q @ k.swapaxes(2, 3), v), PLAIN),
    Spelling("movedim", lambda q, k, v: attend(q @ k.movedim(-1, 2), v), PLAIN),
    Spelling("movedims", lambda q, k, v: attend(q @ torch.movedim(k, (1, 2, 3), (1, 3, 2)), v), PLAIN),
    Spelling("moveaxis", lambda q, k, v: attend(q @ torch.moveaxis(k, -1, -2), v), PLAIN),
    Spelling("negative_permute", lambda q, k, v: attend(q @ k.permute(0, 1, -1, -2), v), PLAIN),
    Spelling("adjoint", lambda q, k, v: attend(q @ k.mH, v), PLAIN),
    Spelling("folded_heads", _folded, "4 heads, d=8; score s/2", kernel="auto"),
    Spelling("baddbmm", _baddbmm, "4 heads, d=8; score s/4 + bias[h, q, k]/2", extra=(ramp(4, Q, K),)),
    Spelling("baddbmm_beta_zero", _baddbmm_empty, "4 heads, d=8; score s/8"),
    Spelling("addmm", _addmm, "1 heads, d=8; score s/2 + bias[q, k]", ((Q, 8), (K, 8), (K, 8)), extra=(ramp(Q, K),)),
    Spelling("einsum", _pair("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"), PLAIN, LAST, kernel="auto"),
    Spelling("einsum_other_letters", _pair("nlhe,nshe->nhls", "nhls,nshd->nlhd"), PLAIN, LAST),
    Spelling("einsum_heads_first", _pair("bhid,bhjd->bhij", "bhij,bhjd->bhid"), PLAIN),
    Spelling("einsum_to_time_first", _pair("bhid,bhjd->bhij", "bhij,bhjd->ibhd"), PLAIN),
    Spelling("einsum_values_first", lambda q, k, v: torch.einsum("bhjd,bhij->bhdi", v, torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1)), PLAIN),
    Spelling("einsum_ellipsis", _pair("...id,...jd->...ij", "...ij,...jd->...id"), PLAIN),
    Spelling("einsum_ellipsis_inside", _pair("b...qd,b...kd->b...qk", "b...qk,b...kd->b...qd"), PLAIN),
    Spelling("einsum_implicit", lambda q, k, v: torch.einsum("bhij,bhjz->bhiz", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v), PLAIN),
    Spelling("einsum_implicit_output", lambda q, k, v: torch.einsum("ij,jd", torch.einsum("id,jd", q, k).softmax(-1), v), "1 heads, d=8; score s", ((Q, 8), (K, 8), (K, 8))),
    Spelling("einsum_uppercase", _pair("BTNH,BSNH->BNTS", "BNTS,BSNH->BTNH"), PLAIN, LAST),
    Spelling("einsum_spaces", _pair("b q h d, b k h d -> b h q k", "b h q k, b k h d -> b q h d"), PLAIN, LAST),
    Spelling("einsum_sublists", lambda q, k, v: torch.einsum(torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]).softmax(-1), [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4]), PLAIN),
    Spelling("einsum_keys_first", _keys_first, PLAIN),
    Spelling("einsum_shared_keys", _pair("bhid,jd->bhij", "bhij,jd->bhid"), "4/1 heads, d=8; score s", ((2, 4, Q, 8), (K, 8), (K, 8))),
    Spelling("einsum_three_operands", _three_operands, "4 heads, d=8; score s*bias[h]; gate bias2[h]", extra=(ramp(4), ramp(4, scale=2))),
    Spelling("einsum_mask_operand", _masked_operand, "4 heads, d=8; score s; weight times where(mask[b, k], 1, 0)", extra=(torch.tensor([[1] * 9, [1] * 5 + [0] * 4], dtype=torch.bool),)),
    Spelling("einsum_grouped", _grouped, "2/1 heads, d=8; score s", GROUPED),
    Spelling("grouped_rows", _grouped_rows, "2 heads, d=8; score s; keep k <= q % 7 (empty row: nan)", GROUPED),
    Spelling("grouped_broadcast", _broadcast_group, "2/1 heads, d=8; score s", GROUPED),
    Spelling("products_summed", _products, PLAIN),
    Spelling("tensordot", lambda q, k, v: torch.tensordot(torch.tensordot(q, k, dims=([1], [1])).softmax(-1), v, dims=1), "1 heads, d=8; score s", ((Q, 8), (K, 8), (K, 8))),
    Spelling("tensordot_batch", _tensordot_between, "4/1 heads, d=8; score s/2", ((2, 4, Q, 8), (K, 8), (K, 8))),
    Spelling("vector_query", lambda q, k, v: torch.einsum("bhk,bhkd->bhd", torch.einsum("bhd,bhkd->bhk", q, k).softmax(-1), v), PLAIN, ((2, 4, 8), (2, 4, K, 8), (2, 4, K, 8))),
    Spelling("vectors", lambda q, k, v: (k @ q).softmax(0) @ v, "1 heads, d=8; score s", ((8,), (K, 8), (K, 8))),
    Spelling("vectors_times_matrix", lambda q, k, v: torch.matmul(torch.matmul(q, k.t()).softmax(-1), v), "1 heads, d=8; score s", ((8,), (K, 8), (K, 8))),
    Spelling("mv", lambda q, k, v: torch.mv(v.t(), torch.mv(k, q).softmax(0)), "1 heads, d=8; score s", ((8,), (K, 8), (K, 8))),
    Spelling("vector_for_all", lambda q, k, v: ((k @ q).softmax(-1)[..., None, :] @ v)[..., 0, :], PLAIN, ((8,), (2, 4, K, 8), (2, 4, K, 8))),
    Spelling("two_sets_of_keys", _two_sets, PLAIN),
)  # fmt: skip
