"""Attention that is written to, cut from its gradient, random, or entangled with its own scores: more false friends.

The rows are those of `tests/false_friends.py`: what may be fused beside them is counted, the rest has its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.false_friends import CHANGED, NO_CONTRACTION, OWN, QKV, Friend, N, tensor

INF = float("inf")
MASK = tensor(N, N, seed=5) > 0


def attend(q: Tensor, k: Tensor, v: Tensor, change: Callable = lambda s: s, after: Callable = lambda p: p) -> Tensor:
    """Plain attention with something done to its scores or to its weights."""
    return after(change(q @ k.mT).softmax(-1)) @ v


# --- writes between the contractions ----------------------------------------------------------------


def _scores_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = scores.softmax(-1)
    scores.zero_()
    return weights @ v + scores


def _weights_zeroed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0
    return weights @ v


def _weights_zeroed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights.view(-1)[::3].mul_(0.5)
    return weights @ v


def _scores_seen_by_stride(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.as_strided((N, N), (N, 1)).fill_(1.0)
    return scores.softmax(-1) @ v


def _values_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = v * 1
    weights = (q @ k.mT).softmax(-1)
    values[:, :, 0] += 1
    return weights @ values


def _given_key_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    k.mul_(2)
    return scores.softmax(-1) @ v


def _given_key_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    k[:, 0].mul_(2)
    return scores.softmax(-1) @ v


def _given_query_written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = scores.softmax(-1)
    q.add_(1)
    return weights @ v + q


def _own_query_written_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    weights = (q @ k.mT).softmax(-1)
    q.add_(1)
    return weights @ v + q


def _given_mask_written(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = q @ k.mT + bias
    bias.zero_()
    return scores.softmax(-1) @ v


def _output_given_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = attend(q, k, v)
    return out, out.transpose(1, 2)


def _output_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q, k, v)
    part = out[:, 0]
    part.add_(1)
    return out


IN_PLACE = "changed in place before the attention ends"
WRITES = (
    Friend("scores_zeroed", _scores_zeroed, fused=1),
    Friend("weights_zeroed", _weights_zeroed, QKV, ("meet no value",), backward=False),
    Friend(
        "weights_zeroed_through_a_view",
        _weights_zeroed_through_a_view,
        QKV,
        ("no dimension of the output",),
        backward=False,
    ),
    Friend("scores_seen_by_stride", _scores_seen_by_stride, QKV, (IN_PLACE,)),
    Friend("values_written", _values_written, fused=1),
    Friend("given_key_written", _given_key_written, QKV, (IN_PLACE,), backward=False),
    Friend("given_key_written_through_a_view", _given_key_written_through_a_view, QKV, (IN_PLACE,), backward=False),
    Friend("given_query_written_after", _given_query_written_after, QKV, (IN_PLACE,), backward=False),
    Friend("own_query_written_after", _own_query_written_after, fused=1, backward=False),
    Friend("given_mask_written", _given_mask_written, (*QKV, tensor(N, N)), (IN_PLACE,)),
    Friend("output_given_twice", _output_given_twice, fused=1),
    Friend("output_written", _output_written, fused=1),
)

# --- what depends on the scores or on the weights ---------------------------------------------------


def _values_of_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ (v * weights.mean(-2).unsqueeze(-1))


def _twice_applied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ (weights @ v)


def _top_k_threshold(s: Tensor) -> Tensor:
    return s.masked_fill(s < s.topk(2, -1).values[..., -1:], -INF)


def _top_k_places(s: Tensor) -> Tensor:
    keep = torch.zeros_like(s).scatter(-1, s.topk(2, -1).indices, 1.0)
    return s.masked_fill(keep == 0, -INF)


def _above_the_mean(s: Tensor) -> Tensor:
    return s.masked_fill(s < s.mean(-1, keepdim=True), -INF)


def _sparsemax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    count = (ordered * torch.arange(1.0, N + 1) > sums).sum(-1, keepdim=True)
    tau = sums.gather(-1, count - 1) / count
    return (scores - tau).relu() @ v


def _mask_of_the_previous_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q[:, 0] @ k[:, 0].mT).softmax(-1)
    second = (q[:, 1] @ k[:, 1].mT).masked_fill(first < 0.2, -1e4).softmax(-1)
    return second @ v[:, 1]


def _keys_of_the_previous_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q @ k.mT).softmax(-1)
    return attend(q, k * first.sum(-2).unsqueeze(-1), v)


def _renormalised(p: Tensor) -> Tensor:
    p = p.clamp(min=0.2)
    return p / p.sum(-1, keepdim=True)


def _renormalised_after_dropout(p: Tensor) -> Tensor:
    p = F.dropout(p, 0.5, training=True)
    return p / (p.sum(-1, keepdim=True) + 1e-6)


def _sinkhorn(p: Tensor) -> Tensor:
    for _ in range(2):
        p = p / p.sum(-2, keepdim=True)
        p = p / p.sum(-1, keepdim=True)
    return p


def _minimum_less_its_log_sum(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A row of finfo.min less its log-sum-exp is a row of zeros: every weight is one."""
    scores = (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def _routing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Capsules: the weights of a round depend on the result of the one before."""
    scores = q @ k.mT
    out = scores.softmax(-1) @ v
    return (scores + out @ v.mT).softmax(-1) @ v


ENTANGLED = (
    Friend("values_of_weights", _values_of_weights, QKV, (OWN,)),
    Friend("twice_applied", _twice_applied, fused=1),
    Friend("top_k_threshold", lambda q, k, v: attend(q, k, v, _top_k_threshold), QKV, ("top-k attention",)),
    Friend("top_k_places", lambda q, k, v: attend(q, k, v, _top_k_places), QKV, ("top-k attention",)),
    Friend("above_the_mean", lambda q, k, v: attend(q, k, v, _above_the_mean), QKV, ("scores are compared with one another",)),
    Friend("temperature_of_the_scores", lambda q, k, v: attend(q, k, v, lambda s: s / s.std(-1, keepdim=True)), QKV, (OWN,)),
    Friend("sparsemax", _sparsemax, QKV, ("sparsemax or entmax",)),
    Friend("mask_of_the_previous_head", _mask_of_the_previous_head, fused=1),
    Friend("keys_of_the_previous_weights", _keys_of_the_previous_weights, fused=1),
    Friend("clamped_and_renormalised", lambda q, k, v: attend(q, k, v, after=_renormalised), QKV, (CHANGED,)),
    Friend("renormalised_after_dropout", lambda q, k, v: attend(q, k, v, after=_renormalised_after_dropout), QKV, (OWN,)),
    Friend("sinkhorn", lambda q, k, v: attend(q, k, v, after=_sinkhorn), QKV, ("Sinkhorn attention",)),
    Friend("minimum_less_its_log_sum", _minimum_less_its_log_sum, (*QKV, MASK), ("does not sum to one",)),
    Friend("exponential_of_a_logarithm", lambda q, k, v: attend(q, k, v, lambda s: s.log().exp()), QKV, (NO_CONTRACTION,), backward=False),
    Friend("square_of_a_root", lambda q, k, v: attend(q, k, v, lambda s: s.sqrt() ** 2), QKV, (NO_CONTRACTION,), backward=False),
    Friend("weights_of_weights", lambda q, k, v: attend(q, k, v, after=lambda p: p.softmax(-1)), QKV, (NO_CONTRACTION,)),
    Friend("identity_added", lambda q, k, v: attend(q, k, v, after=lambda p: p + torch.eye(N)), QKV, (CHANGED,)),
    Friend("centred", lambda q, k, v: attend(q, k, v, after=lambda p: p - p.mean(-1, keepdim=True)), QKV, (CHANGED,)),
    Friend("rounded", lambda q, k, v: attend(q, k, v, after=lambda p: p.round()), QKV, ()),
    Friend("thresholded", lambda q, k, v: attend(q, k, v, after=lambda p: p * (p > 0.2)), QKV, (CHANGED,)),
    Friend("cumulated", lambda q, k, v: attend(q, k, v, after=lambda p: p.cumsum(-1)), QKV, ()),
    Friend("logarithms_applied", lambda q, k, v: (q @ k.mT).log_softmax(-1) @ v, QKV, ()),
    Friend("routing_by_agreement", _routing, fused=2),
)  # fmt: skip

# --- gradients, random numbers, element types -------------------------------------------------------


def _straight_through(p: Tensor) -> Tensor:
    hard = F.one_hot(p.argmax(-1), N).to(p.dtype)
    return hard + p - p.detach()


def _two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + v @ k.mT).softmax(-1) @ v


def _noisy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores + 0.1 * torch.randn(scores.shape)).softmax(-1) @ v


def _without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def _keys_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys = k * 2
    return attend(q, keys, v)


def _bias_without_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        bias = bias * 2
    return attend(q, k, v, lambda s: s + bias)


INTS = tuple(x.mul(2).round().long() for x in QKV)
COMPLEX = tuple(torch.complex(x, x.flip(0)) for x in QKV)
SUBTLE = (
    Friend("detached_weights", lambda q, k, v: attend(q, k, v, after=lambda p: p.detach()), QKV, (CHANGED,)),
    Friend("detached_scores", lambda q, k, v: attend(q, k, v, lambda s: s.detach()), QKV, (NO_CONTRACTION,)),
    Friend("detached_keys", lambda q, k, v: attend(q, k.detach(), v), fused=1),
    Friend("detached_values", lambda q, k, v: attend(q, k, v.detach().transpose(0, 1)), fused=1),
    Friend("weights_without_gradient", _without_gradient, QKV, (CHANGED,)),
    Friend("keys_without_gradient", _keys_without_gradient, fused=1),
    Friend("bias_without_gradient", _bias_without_gradient, (*QKV, tensor(N, N)), fused=1),
    Friend("straight_through", lambda q, k, v: attend(q, k, v, after=_straight_through), QKV, (CHANGED,)),
    Friend("hard_gumbel", lambda q, k, v: F.gumbel_softmax(q @ k.mT, hard=True) @ v, QKV, (CHANGED,)),
    Friend("soft_gumbel", lambda q, k, v: F.gumbel_softmax(q @ k.mT, tau=0.5) @ v, fused=1),
    Friend("random_noise", _noisy, fused=1),
    Friend("dropped_scores", lambda q, k, v: attend(q, k, v, lambda s: F.dropout(s, 0.5)), QKV, ("dropout acts on the scores",)),
    Friend("two_products", _two_products, fused=1),
    Friend("other_batch", lambda q, k, v: attend(q, k, v.roll(1, 0)), fused=1),
    Friend("batch_as_sequence", lambda q, k, v: attend(*(x.flatten(0, 2) for x in (q, k, v))), fused=1),
    Friend("integer_products", lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32) @ v.float(), INTS, ("floating point",)),
    Friend("complex_scores", lambda q, k, v: torch.view_as_complex(torch.view_as_real(q @ k.mT).softmax(-2)) @ v, COMPLEX),
    Friend("magnitudes", lambda q, k, v: (q @ k.mH).abs().softmax(-1) @ v.real, COMPLEX, ("floating point",)),
    Friend("real_parts", lambda q, k, v: (q @ k.mH).real.softmax(-1) @ v.real, COMPLEX, (NO_CONTRACTION,)),
    Friend("fake_quantised", lambda q, k, v: attend(q, k, v, after=lambda p: torch.fake_quantize_per_tensor_affine(p, 0.1, 0, 0, 15)), QKV, ()),
    Friend("half_of_each_type", lambda q, k, v: (q.bfloat16() @ k.bfloat16().mT).float().softmax(-1) @ v, fused=1, golden=attend),
    Friend("weights_rounded_down", lambda q, k, v: (q @ k.mT).softmax(-1).bfloat16() @ v.bfloat16(), fused=1, golden=attend),
    Friend("rounded_scores", lambda q, k, v: attend(q, k, v, torch.round), QKV, (NO_CONTRACTION,)),
    Friend("integer_scores", lambda q, k, v: attend(q, k, v, lambda s: s.int().float()), QKV, ("scores are compared",)),
    Friend("integer_values", lambda q, k, v: ((q @ k.mT).softmax(-1) * 10).long() @ v.long(), QKV, (CHANGED,)),
)  # fmt: skip

UNSAFE = (*WRITES, *ENTANGLED, *SUBTLE)
