"""The same by another name: second names of operators, masks by indexed assignment, sums of booleans, grids, maxima."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.row import MIN, NEG_INF, PAD, PAD_ROWS, K, Q, Spelling, attend, ramp

PLAIN = "4 heads, d=8; score s"
CAUSAL = f"{PLAIN}; keep k <= q (empty row: nan)"
PADDED = f"{PLAIN}; keep mask[b, k] (empty row: nan)"
# What an integer mask may hold besides zeros and ones.
LEVELS = torch.tensor([[2, 1, 3, 0, 1, 2, 1, 1, 5], [1, 2, 2, 0, 0, 3, 4, 1, 1]])


def _before() -> Tensor:
    return torch.ones(Q, K, dtype=torch.bool).tril()


def _second_names(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.true_divide(torch.linalg.matmul(q, k.mT), 2.0)
    scores = torch.subtract(torch.multiply(scores, 0.5), torch.negative(torch.absolute(torch.tensor(-1.0))))
    later = torch.greater(torch.arange(K), torch.arange(Q)[:, None])
    return torch.linalg.matmul(torch.special.softmax(scores.masked_fill(later, NEG_INF), -1), v)


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend((q @ k.mT).divide_(4.0).multiply_(2.0).clip_(-3, 3), v)


def _stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cached keys and values by `concat` and `dstack`."""
    return attend(q @ torch.concat([k, k], 2).mT, torch.dstack([v, v]))


def _assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., ~_before()] = NEG_INF
    return attend(scores, v)


def _assigned_everywhere(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[~pad[:, None, None].expand_as(scores)] = NEG_INF
    return attend(scores, v)


def _mask_assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(Q, K)
    mask[~_before()] = NEG_INF
    return attend(q @ k.mT + mask, v)


def _first_key_open(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal from the right, where every query sees the first key too."""
    mask = torch.full((Q, K), NEG_INF).triu(1 - Q + 4)
    mask[:, 0] = 0
    return attend(q @ k.mT + mask, v)


def _grid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.meshgrid(torch.arange(Q), torch.arange(K), indexing="ij")
    return attend((q @ k.mT).masked_fill(j > i, NEG_INF), v)


def _grid_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    j, i = torch.meshgrid(torch.arange(K), torch.arange(Q), indexing="xy")
    return attend((q @ k.mT).masked_fill(j > i, NEG_INF), v)


def _broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.broadcast_tensors(torch.arange(Q)[:, None], torch.arange(K))
    return attend((q @ k.mT).masked_fill(j > i, NEG_INF), v)


def _sum_of_booleans(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """True plus True is True, and one as a float."""
    drop = ~pad[:, None, None] + ~_before()
    return attend(q @ k.mT - drop.to(q.dtype) * 8.0, v)


def _lowest_bit(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    """An integer mask and a boolean one: what counts of the first is its lowest bit."""
    keep = levels[:, None, None] & _before()
    return attend((q @ k.mT).masked_fill(keep == 0, NEG_INF), v)


def _either_bit(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    return attend(q @ k.mT + (levels[:, None, None] | _before()).to(q.dtype), v)


def _unequal(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(pad[:, None, None] ^ _before(), -4.0), v)


def _shifted(reduce):  # type: ignore[no-untyped-def]
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        powers = (scores - reduce(scores)).exp()
        return powers / powers.sum(-1, keepdim=True) @ v

    return run


class Buckets(nn.Module):
    """T5's table, of which one row has no gradient, or all have gradients by how often they are read."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            self.table.weight.copy_(ramp(16, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with the bias of the logarithmic distance."""
        gap = (torch.arange(K) - torch.arange(Q)[:, None]).abs()
        places = (torch.log(gap.float() + 1) / math.log(2) * 3).to(torch.long)
        return attend(q @ k.mT + self.table(places).permute(2, 0, 1), v)


def _log_sum_exp_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """finfo.min under a log-sum-exp, where every row keeps a key."""
    scores = (q @ k.mT).masked_fill(~_before(), MIN)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def _undefined(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Zero times minus infinity: the source's mask is NaN where it keeps, and stays so."""
    return attend(q @ k.mT + (1.0 - keep[:, None, None]) * NEG_INF, v)


def _switched_off(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A bias times zero is NaN where the bias is infinite."""
    return attend(q @ k.mT + bias * 0.0, v)


def _one_entry(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A batch of one with two heads of values for four of queries, folded for the second product only."""
    weights = (q @ k.repeat(1, 2, 1, 1).mT).softmax(-1)
    return torch.bmm(weights.reshape(4, Q, K), v.repeat(1, 2, 1, 1).reshape(4, K, 8)).view(1, 4, Q, 8)


def _dead_queries(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, temperature: Tensor) -> Tensor:
    """A mask of queries by finfo.min, beside a temperature that may be anything: such a row is uniform."""
    scores = (q @ k.mT) * temperature[:, None, None]
    return attend(scores + (1.0 - keep[:, None, :Q, None].to(q.dtype)) * MIN, v)


def _log_softmax_minimum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = torch.where(pad[:, None, None], q @ k.mT, torch.finfo(q.dtype).min)
    return scores.log_softmax(-1).exp() @ v


def _unordered(q: Tensor, k: Tensor, v: Tensor, quality: Tensor) -> Tensor:
    """Not above zero is not the same as at most zero: NaN is neither."""
    return attend((q @ k.mT).masked_fill(~(quality > 0)[:, None, None], -2.0), v)


def _twice_the_minimum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Scaled after the mask, the fill overflows: a row without a key is NaN."""
    fill = (1.0 - pad[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
    return attend((q @ k.mT + fill) * 2.0, v)


def _wrapping(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    """The square of an integer of 32 bits may be negative."""
    return attend((q @ k.mT).masked_fill((levels * levels)[:, None, None] < 0, -3.0), v)


QUALITY = ramp(2, K).masked_fill(torch.arange(K) % 4 == 1, float("nan"))
WIDE = torch.tensor([[50000, 2, 60000, 3, 4, 5, 6, 7, 8]] * 2, dtype=torch.int32)
INFINITE = torch.zeros(K).index_fill(0, torch.tensor([1]), NEG_INF)
ROWS = (
    Spelling("second_names", _second_names, "4 heads, d=8; score s/4 + 1; keep k <= q (empty row: nan)"),
    Spelling("second_names_in_place", _in_place, "4 heads, d=8; score minimum(maximum(s/2, -3), 3)"),
    Spelling("second_names_of_cat", _stacked, PLAIN),
    Spelling("interpolated", lambda q, k, v, b: attend(torch.lerp(q @ k.mT, b, 0.25), v), "4 heads, d=8; score 3/4*s + bias[h, q, k]/4", extra=(ramp(4, Q, K),)),
    Spelling("mish", lambda q, k, v: attend(F.mish(q @ k.mT), v), "4 heads, d=8; score s*tanh(log(exp(-abs(s)) + 1) + maximum(s, 0))"),
    Spelling("assigned_by_mask", _assigned, CAUSAL, kernel="auto"),
    Spelling("assigned_by_whole_mask", _assigned_everywhere, PADDED, extra=(PAD,)),
    Spelling("mask_assigned_by_mask", _mask_assigned, CAUSAL),
    Spelling("first_key_open", _first_key_open, f"{PLAIN}; keep k + 3 <= q or k == 0 (empty row: nan)"),
    Spelling("grid", _grid, CAUSAL),
    Spelling("grid_turned", _grid_turned, CAUSAL),
    Spelling("broadcast_tensors", _broadcast, CAUSAL),
    Spelling("booleans_added", _sum_of_booleans, f"{PLAIN} + where(k <= q and mask[b, k], 0, -8)", extra=(PAD_ROWS,)),
    Spelling("integer_and_boolean", _lowest_bit, f"{PLAIN}; keep k <= q and mask[b, k] % 2 != 0 (empty row: nan)", extra=(LEVELS,), kernel="auto"),
    Spelling("integer_or_boolean", _either_bit, f"{PLAIN} + where(k <= q, mask[b, k] - mask[b, k] % 2 + 1, mask[b, k])", extra=(LEVELS,)),
    Spelling("booleans_unequal", _unequal, "4 heads, d=8; score where((k <= q or not mask[b, k]) and (q + 1 <= k or mask[b, k]), s, -4)", extra=(PAD_ROWS,)),
    Spelling("less_the_largest", _shifted(lambda s: s.max()), PLAIN, kernel="auto"),
    Spelling("less_the_largest_of_rows", _shifted(lambda s: s.amax((-2, -1), keepdim=True)), PLAIN),
    Spelling("table_with_a_dead_row", Buckets(padding_idx=3), f"{PLAIN} + bias[h, q, k]"),
    Spelling("table_by_frequency", Buckets(scale_grad_by_freq=True), f"{PLAIN} + bias[h, q, k]"),
    Spelling("logsumexp_minimum", _log_sum_exp_padded, f"{PLAIN}; keep k <= q (empty row: nan)"),
    Spelling("zero_times_infinity", _undefined, f"{PLAIN} + bias[b, k]", extra=(PAD_ROWS.float(),)),
    Spelling("infinite_bias_times_zero", _switched_off, f"{PLAIN} + bias[k]", extra=(INFINITE,)),
    Spelling("floats_without_order", _unordered, "4 heads, d=8; score where(mask[b, k], s, -2)", extra=(QUALITY,)),
    Spelling("twice_the_minimum", _twice_the_minimum, "4 heads, d=8; score 2*s; keep mask[b, k] (empty row: nan)", extra=(PAD_ROWS,)),
    Spelling("integers_that_wrap", _wrapping, "4 heads, d=8; score where(mask[b, k] < 0, -3, s)", extra=(WIDE,)),
    Spelling("batch_of_one_folded", _one_entry, "2 heads, d=8; score s", ((1, 4, Q, 8), (1, 2, K, 8), (1, 2, K, 8))),
    Spelling("dead_queries", _dead_queries, f"{PLAIN}*bias[h] + where(mask[b, q], 0, -3.40282e+38)", extra=(PAD_ROWS, ramp(4)), gradients=False),
    Spelling("log_softmax_minimum", _log_softmax_minimum, f"{PLAIN}; keep mask[b, k] (empty row: uniform)", extra=(PAD_ROWS,)),
)  # fmt: skip
