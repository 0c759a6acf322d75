"""Graphs that look like attention and are not, or not safely: rows of (name, run, inputs, what becomes of each site).

Every tensor here has the size 4 in every dimension unless a row says otherwise, so that no size tells one axis from
another: only the meaning of the graph can. `reasons` holds a regular expression for the reason of each declined site
in graph order; `fused` counts the sites that are exact attention and may be fused beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

N = 4
ORDER = torch.tensor([2, 0, 3, 1])


def tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


QKV = tuple(tensor(N, N, N, N, seed=seed) for seed in range(3))
X, W1, W2 = tensor(N, N, N), tensor(N, N, seed=1), tensor(N, N, seed=2)


@dataclass(frozen=True)
class Friend:
    """A function of `inputs`; its sites: so many fused, and one declined for each of `reasons`.

    `backward` is off where eager PyTorch refuses the gradient, because an input was written to. `golden` is what to compute in
    fp64 where `run` names an element type itself.
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[Tensor, ...] = QKV
    reasons: tuple[str, ...] = ()
    fused: int = 0
    backward: bool = True
    golden: Callable[..., Any] | None = None


# --- gates, classifiers, routers: a softmax or a product, but no attention --------------------------


def _squeeze_excite(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    gate = F.linear(F.relu(F.linear(x.mean((2, 3)), w1)), w2).sigmoid()
    return x * gate[:, :, None, None]


def _spatial_gate(x: Tensor, w: Tensor) -> Tensor:
    pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
    return x * F.conv2d(pooled, w, padding=1).sigmoid()


def _global_context(x: Tensor, w: Tensor) -> Tensor:
    """GCNet: one map of weights over all places, the same for every query."""
    weights = F.conv2d(x, w).flatten(2).softmax(-1)
    return x + (x.flatten(2) @ weights.mT).unsqueeze(-1)


def _selective_kernel(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """SKNet: a softmax over branches."""
    branches = torch.stack([x, x.relu()], 1)
    squeezed = F.relu(branches.sum(1).mean((2, 3)) @ w1)
    weights = torch.stack([squeezed @ w2, squeezed @ w1], 1).softmax(1)
    return (branches * weights[..., None, None]).sum(1)


def _expected_embedding(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
    return F.linear(x, w).softmax(-1) @ table


def _mixtral_router(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    weights, chosen = (flat @ w1).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    mask = F.one_hot(chosen, N).permute(2, 1, 0).float()
    out = torch.zeros_like(flat)
    for expert in range(N):
        share = (mask[expert] * weights.mT).sum(0)
        out = out + (flat * w2[expert]) * share[:, None]
    return out


def _dense_experts(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    made = torch.einsum("bnd,edf->bnef", x, experts)
    return torch.einsum("bne,bnef->bnf", (x @ w).softmax(-1), made)


def _routed_matmul(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """softmax, top-k, then a product with what the experts gave."""
    weights, chosen = (x @ w1).softmax(-1).topk(2, -1)
    return weights.unsqueeze(-2) @ w2[chosen]


def _soft_argmax(heat: Tensor, places: Tensor) -> Tensor:
    return (heat.flatten(2).softmax(-1).unflatten(-1, (N, N)).sum(2) @ places).squeeze(-1)


def _disparity(cost: Tensor) -> Tensor:
    return ((-cost).softmax(1) * torch.arange(float(N))[:, None, None]).sum(1)


def _mil_pooling(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Gated multiple-instance pooling: scores are a linear map of each element alone."""
    scores = F.linear((x @ w1).tanh() * (x @ w2).sigmoid(), w1[:1])
    return scores.transpose(-1, -2).softmax(-1) @ x


def _additive(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Bahdanau: the score is a linear map of tanh(q + k), no product of the two."""
    hidden = torch.tanh(q[:, :, :, None] + k[:, :, None])
    return (hidden @ w[:, :1]).squeeze(-1).softmax(-1) @ v


def _crf(emissions: Tensor, transitions: Tensor) -> Tensor:
    alpha = emissions[:, 0]
    for t in range(1, N):
        alpha = torch.logsumexp(alpha.unsqueeze(-1) + transitions, 1) + emissions[:, t]
    return alpha.logsumexp(-1)


def _viterbi(emissions: Tensor, transitions: Tensor) -> Tensor:
    alpha = emissions[:, 0]
    for t in range(1, N):
        alpha = (alpha.unsqueeze(-1) + transitions).amax(1) + emissions[:, t]
    return alpha.amax(-1)


def _clip_loss(image: Tensor, text: Tensor) -> Tensor:
    logits = 14.0 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
    labels = torch.arange(N)
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)


def _supervised_contrastive(image: Tensor, text: Tensor) -> Tensor:
    logits = image @ text.mT
    return -(logits.log_softmax(-1) @ torch.eye(N)).diagonal().mean()


def _soft_sort(x: Tensor) -> Tensor:
    return (-(x.sort(-1).values.unsqueeze(-1) - x.unsqueeze(-2)).abs()).softmax(-1) @ x.unsqueeze(-1)


def _net_vlad(x: Tensor, w: Tensor, centres: Tensor) -> Tensor:
    assigned = F.linear(x, w).softmax(-1)
    return assigned.mT @ x - assigned.sum(1).unsqueeze(-1) * centres


def _lora(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return F.linear(x, w1) + (x @ w2[:, :2]) @ w1[:2] * 0.5


NO_CONTRACTION = "no contraction of queries and keys makes the scores"
LOOKALIKES = (
    Friend("squeeze_and_excite", _squeeze_excite, (QKV[0], W1, W2)),
    Friend("spatial_gate", _spatial_gate, (QKV[0], tensor(1, 2, 3, 3))),
    Friend("global_context", _global_context, (QKV[0], tensor(1, N, 1, 1)), (NO_CONTRACTION,)),
    Friend("selective_kernel", _selective_kernel, (QKV[0], W1, W2)),
    Friend("expected_embedding", _expected_embedding, (X, W1, W2), (NO_CONTRACTION,)),
    Friend("mixtral_router", _mixtral_router, (X, W1, W2)),
    Friend("dense_experts", _dense_experts, (X, W1, tensor(N, N, N, seed=3)), (NO_CONTRACTION,)),
    Friend("routed_matmul", _routed_matmul, (X, W1, W2)),
    Friend("soft_argmax", _soft_argmax, (QKV[0], tensor(N, 1))),
    Friend("disparity_regression", _disparity, (QKV[0],)),
    Friend("gated_pooling", _mil_pooling, (X, W1, W2), (NO_CONTRACTION,)),
    Friend("additive_attention", _additive, (*QKV, W1), ("query is not a tensor",)),
    Friend("crf_forward", _crf, (X, W1)),
    Friend("viterbi", _viterbi, (X, W1)),
    Friend("cosine_classifier", lambda x, w: (16 * F.normalize(x, dim=-1) @ F.normalize(w, dim=-1).mT).log_softmax(-1), (X, W1)),
    Friend("clip_loss", _clip_loss, (W1, W2)),
    Friend("contrastive_loss", _supervised_contrastive, (W1, W2)),
    Friend("soft_sort", _soft_sort, (X,), (NO_CONTRACTION,)),
    Friend("net_vlad", _net_vlad, (X, W1, W2), ("softmax does not run over the keys",)),
    Friend("distance_codebook", lambda x, c: (-torch.cdist(x, c)).softmax(-1) @ c, (X, W1), (NO_CONTRACTION,)),
    Friend("relu_mlp", lambda x, w1, w2: (x @ w1).relu() @ w2, (X, W1, W2)),
    Friend("relu_mlp_of_linears", lambda x, w1, w2: F.linear(F.linear(x, w1).relu(), w2), (X, W1, W2)),
    Friend("sigmoid_mlp", lambda x, w1, w2: (x @ w1).sigmoid() @ w2, (X, W1, W2)),
    Friend("gelu_mlp", lambda x, w1, w2: F.gelu(x @ w1) @ w2, (X, W1, W2)),
    Friend("gated_mlp", lambda x, w1, w2: (F.silu(x @ w1) * (x @ w2)) @ w1, (X, W1, W2)),
    Friend("lora", _lora, (X, W1, W2)),
    Friend("chain_of_products", lambda q, k, v: q @ k @ v),
)  # fmt: skip


# --- a softmax along something else than the keys ---------------------------------------------------


def _slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention: slots compete for inputs, then each slot's weights are normalised."""
    weights = (k @ q.mT).softmax(-1) + 1e-8
    return (weights / weights.sum(-2, keepdim=True)).mT @ v


def _dual_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LoFTR's matching: over the keys times over the queries."""
    scores = q @ k.mT
    return (scores.softmax(-1) * scores.softmax(-2)) @ v


def _shifted_by_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax by hand over the queries, stabilised by maxima over the keys: these do not cancel."""
    scores = q @ k.mT
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-2, keepdim=True)).mT @ v


OWN = "is computed from the scores"
OVER = "softmax does not run over the keys"
CHANGED = "weights are changed between the softmax and the values"
NO_TENSOR = "is not a tensor by batch, head, position and feature"
NOT_ALL = f"{OVER}|runs over more than the keys|{NO_TENSOR}"
AXES = (
    Friend("over_queries", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, QKV, (OVER,)),
    Friend("over_heads", lambda q, k, v: (q @ k.mT).softmax(1) @ v, QKV, (OVER,)),
    Friend("over_the_batch", lambda q, k, v: (q @ k.mT).softmax(0) @ v, QKV, (OVER,)),
    Friend("over_keys_applied_to_queries", lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v, QKV, (OVER,)),
    Friend("over_features", lambda q, k, v: (q.softmax(-1) @ k.mT) @ v, QKV, (NO_CONTRACTION,)),
    Friend("over_all_pairs", lambda q, k, v: (q @ k.mT).flatten(-2).softmax(-1).unflatten(-1, (N, N)) @ v, QKV, (OVER,)),
    Friend("over_folded_batch", lambda q, k, v: (q @ k.mT).flatten(0, 1).softmax(0).unflatten(0, (N, N)) @ v, QKV, (OVER,)),
    Friend("slot_attention", _slots, QKV, (OVER,)),
    Friend("dual_softmax", _dual_softmax, QKV, (OWN, OVER)),
    Friend("half_of_the_keys", lambda q, k, v: (q @ k.mT).softmax(-1)[..., :2] @ v[..., :2, :], QKV, (NOT_ALL,)),
    Friend("all_but_the_first_key", lambda q, k, v: (q @ k.mT).softmax(-1)[..., 1:] @ v[..., 1:, :], QKV, (NOT_ALL,)),
    Friend("every_other_key", lambda q, k, v: (q @ k.mT).softmax(-1)[..., ::2] @ v[..., ::2, :], QKV, (NOT_ALL,)),
    Friend("padded_weights", lambda q, k, v: F.pad((q @ k.mT).softmax(-1), (0, N)) @ torch.cat([v, v], -2), fused=1),
    Friend("softmax_before_the_last_keys", lambda q, k, v: torch.cat([(q @ k.mT).softmax(-1)] * 2, -1) @ torch.cat([v, v], -2), QKV, ("applied to two values",)),
    Friend("summed_over_the_batch", lambda q, k, v: torch.einsum("bhqk,bhkd->hqd", (q @ k.mT).softmax(-1), v), QKV, ("form that is not known",)),
    Friend("summed_by_addbmm", lambda q, k, v: torch.addbmm(q[0, 0], (q[0] @ k[0].mT).softmax(-1), v[0]), QKV, ("form that is not known",)),
    Friend("values_by_query", lambda q, k, v: torch.einsum("bhqk,bqkd->bhqd", (q @ k.mT).softmax(-1), v), QKV, (NO_CONTRACTION,)),
    Friend("heads_and_queries_swapped", lambda q, k, v: (q @ k.mT).softmax(-1).transpose(1, 2) @ v, QKV, (NO_CONTRACTION,)),
    Friend("keys_in_another_order", lambda q, k, v: (q @ k.mT).softmax(-1)[..., ORDER] @ v[..., ORDER, :]),
    Friend("weights_in_another_order", lambda q, k, v: (q @ k.mT).softmax(-1)[..., ORDER] @ v),
    Friend("weights_reversed", lambda q, k, v: (q @ k.mT).softmax(-1).flip(-1) @ v, QKV, (OVER,)),
    Friend("weights_rolled", lambda q, k, v: (q @ k.mT).softmax(-1).roll(1, -1) @ v, QKV, (OVER,)),
    Friend("next_querys_weights", lambda q, k, v: (q @ k.mT).softmax(-1).roll(1, -2) @ v, QKV, ("",)),
    Friend("shifted_by_another_maximum", _shifted_by_another_maximum, QKV, (OWN,)),
    Friend("values_transposed", lambda q, k, v: (q @ k.mT).softmax(-1) @ v.mT, fused=1),
    Friend("channels_attend", lambda q, k, v: (q.mT @ k).softmax(-1) @ v.mT, fused=1),
    Friend("weights_by_feature", lambda q, k, v: torch.einsum("bhqk,bhkq->bhq", (q @ k.mT).softmax(-1), v), QKV, ("no single query dimension",)),
)  # fmt: skip


FRIENDS = (*LOOKALIKES, *AXES)
