"""The softmax in every spelling, with sinks, guards, dropout and factors on the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import MIN, NEG_INF, PAD_ROWS, Spelling, attend, ramp

PLAIN = "4 heads, d=8; score s"
PADDED = f"{PLAIN}; keep mask[b, k] (empty row: nan)"
ZERO = f"{PLAIN}; keep mask[b, k] (empty row: zero)"
UNIFORM = f"{PLAIN}; keep mask[b, k] (empty row: uniform)"
EMPTY = (PAD_ROWS,)


def _stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    exps = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exps / exps.sum(-1, keepdim=True) @ v


def _stable_max(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF)
    exps = (scores - torch.max(scores, dim=-1, keepdim=True)[0].detach()).exp()
    return (exps / torch.sum(exps, -1)[..., None]) @ v


def _normalised_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum of the weights divides the output."""
    exps = torch.exp(q @ k.mT / 4)
    return (exps @ v) / exps.sum(-1, keepdim=True)


def _normalised_by_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    exps = (scores - scores.max(-1, keepdim=True).values).exp()
    return exps * exps.sum(-1, keepdim=True).reciprocal() @ v


def _masked_exp(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = q @ k.mT
    exps = torch.exp(scores - scores.amax(-1, keepdim=True)) * pad[:, None, None, :]
    return exps / exps.sum(-1, keepdim=True) @ v


def _masked_exp_fill(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    exps = torch.exp(q @ k.mT).masked_fill(~pad[:, None, None], 0.0)
    return exps / exps.sum(-1, keepdim=True) @ v


def _exp_of_minimum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Without the maximum taken off, the exponential of a finite fill is zero: an empty row is 0/0."""
    exps = (q @ k.mT).masked_fill(~pad[:, None, None], MIN).exp()
    return exps / exps.sum(-1, keepdim=True) @ v


def _stable_minimum(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~pad[:, None, None], MIN)
    exps = (scores - scores.amax(-1, keepdim=True)).exp()
    return exps / exps.sum(-1, keepdim=True) @ v


def _renormalised(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * pad[:, None, None]
    return weights / weights.sum(-1, keepdim=True) @ v


def _plus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    top = scores.amax(-1, keepdim=True)
    exps = torch.exp(scores - top)
    return exps / (exps.sum(-1, keepdim=True) + torch.exp(-top)) @ v


def _plus_one_bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exps = (q @ k.mT / 3).exp()
    return exps / (1 + exps.sum(-1, keepdim=True)) @ v


def _plus_one_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v


def _plus_one_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


def _plus_one_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), torch.zeros(()))
    return (scores - total).exp() @ v


def _sink_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT
    column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def _gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pad: Tensor) -> Tensor:
    mask = torch.where(pad[:, None, None], 0.0, MIN)
    scores = q @ k.mT * 0.125 + mask
    combined = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(2, -1, scores.shape[-2], -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ v


def _sink_first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT
    column = sinks[None, :, None, None].repeat(2, 1, scores.shape[-2], 1)
    return torch.cat([column, scores], -1).softmax(-1).narrow(-1, 1, scores.shape[-1]) @ v


def _sink_by_exp(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores, sink = q @ k.mT, sinks[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), sink)
    exps = (scores - top).exp()
    return exps / (exps.sum(-1, keepdim=True) + (sink - top).exp()) @ v


def _weights_masked(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    dropped = ~pad[:, None, None]
    weights = (q @ k.mT).masked_fill(dropped, NEG_INF).softmax(-1)
    return weights.masked_fill(dropped, 0.0) @ v


def _weights_masked_min(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    kept = pad[:, None, None]
    return torch.where(kept, torch.where(kept, q @ k.mT, MIN).softmax(-1), 0.0) @ v


def _any_guard(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    kept = pad[:, None, None]
    weights = (q @ k.mT).masked_fill(~kept, NEG_INF).softmax(-1)
    return torch.where(kept.any(-1, keepdim=True), weights, 0.0) @ v


def _all_guard(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    dropped = ~pad[:, None, None]
    weights = (q @ k.mT).masked_fill(dropped, NEG_INF).softmax(-1)
    return weights.masked_fill(torch.all(dropped, -1, keepdim=True), 0.0) @ v


def _any_factor(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    kept = pad[:, None, None]
    weights = (q @ k.mT).masked_fill(~kept, MIN).softmax(-1)
    return (weights * kept.any(-1, keepdim=True)) @ v


def _double_guard(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Empty rows are given scores of zero before the softmax, and weights of zero after it."""
    dropped = ~pad[:, None, None]
    empty = dropped.all(-1, keepdim=True)
    scores = (q @ k.mT).masked_fill(dropped, NEG_INF).masked_fill(empty, 0.0)
    return scores.softmax(-1).masked_fill(empty, 0.0) @ v


def _first_guard(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    dropped = ~pad[:, None, None]
    scores = (q @ k.mT).masked_fill(dropped, NEG_INF)
    return torch.where(dropped.all(-1, keepdim=True), 0.0, scores).softmax(-1) @ v


def _isnan(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF).softmax(-1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


def _isnan_fill(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF).softmax(-1)
    return weights.masked_fill(weights != weights, 0) @ v


def _nan_to_num(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF).softmax(-1).nan_to_num(0.0) @ v


def _nan_to_num_after(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return attend((q @ k.mT).masked_fill(~pad[:, None, None], NEG_INF), v).nan_to_num()


def _log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT, -1).exp() @ v


def _logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def _weights_scaled(q: Tensor, k: Tensor, v: Tensor, share: Tensor) -> Tensor:
    """A factor for each key on the weights."""
    return ((q @ k.mT).softmax(-1) * share) @ v


def _times_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights times their own scores."""
    scores = q @ k.mT
    return (scores.softmax(-1) * scores) @ v


ROWS = (
    Spelling("softmax", lambda q, k, v: F.softmax(q @ k.mT, dim=3) @ v, PLAIN),
    Spelling("softmax_module", lambda q, k, v: torch.nn.Softmax(dim=-1)(q @ k.mT) @ v, PLAIN),
    Spelling("upcast", lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64).to(v.dtype) @ v, PLAIN),
    Spelling("stable_by_hand", _stable, PLAIN, kernel="auto"),
    Spelling("stable_by_hand_masked", _stable_max, PADDED, extra=EMPTY),
    Spelling("normalised_after", _normalised_after, "4 heads, d=8; score s/4"),
    Spelling("normalised_by_reciprocal", _normalised_by_ones, PLAIN),
    Spelling("masked_exp", _masked_exp, PADDED, extra=EMPTY),
    Spelling("masked_exp_fill", _masked_exp_fill, PADDED, extra=EMPTY),
    Spelling("exp_of_minimum", _exp_of_minimum, PADDED, extra=EMPTY),
    Spelling("stable_minimum", _stable_minimum, UNIFORM, extra=EMPTY),
    Spelling("renormalised", _renormalised, PADDED, extra=EMPTY),
    Spelling("log_softmax", _log_softmax, PLAIN),
    Spelling("logsumexp", _logsumexp, "4 heads, d=8; score s/2"),
    Spelling("softmax_plus_one", _plus_one, f"{PLAIN}; sink 0", kernel="auto"),
    Spelling("softmax_plus_one_bare", _plus_one_bare, "4 heads, d=8; score s/3; sink 0"),
    Spelling("softmax_plus_one_padded", _plus_one_padded, f"{PLAIN}; sink 0"),
    Spelling("softmax_plus_one_first", _plus_one_first, f"{PLAIN}; sink 0"),
    Spelling("softmax_plus_one_logsumexp", _plus_one_logsumexp, f"{PLAIN}; sink 0"),
    Spelling("sink_column", _sink_column, f"{PLAIN}; sink bias[h]", extra=(ramp(4),), kernel="auto"),
    Spelling("gpt_oss", _gpt_oss, "4 heads, d=8; score s/8; keep mask[b, k] (empty row: uniform); sink bias[h]", extra=(ramp(4), PAD_ROWS)),
    Spelling("sink_first", _sink_first, f"{PLAIN}; sink bias[h]", extra=(ramp(4),)),
    Spelling("sink_by_exp", _sink_by_exp, f"{PLAIN}; sink bias[h]", extra=(ramp(4),)),
    Spelling("weights_masked_again", _weights_masked, ZERO, extra=EMPTY),
    Spelling("weights_masked_again_min", _weights_masked_min, ZERO, extra=EMPTY),
    Spelling("guard_any", _any_guard, ZERO, extra=EMPTY),
    Spelling("guard_all", _all_guard, ZERO, extra=EMPTY),
    Spelling("guard_any_factor", _any_factor, ZERO, extra=EMPTY),
    Spelling("guard_both", _double_guard, ZERO, extra=EMPTY),
    Spelling("guard_before", _first_guard, UNIFORM, extra=EMPTY),
    Spelling("where_isnan", _isnan, ZERO, extra=EMPTY),
    Spelling("fill_unequal_to_itself", _isnan_fill, ZERO, extra=EMPTY),
    Spelling("nan_to_num", _nan_to_num, ZERO, extra=EMPTY, kernel="auto"),
    Spelling("nan_to_num_after", _nan_to_num_after, PADDED, extra=EMPTY),
    Spelling("head_mask", lambda q, k, v, m: ((q @ k.mT).softmax(-1) * m[None, :, None, None]) @ v, f"{PLAIN}; gate bias[h]", extra=(torch.tensor([1.0, 0, 1, 0]),)),
    Spelling("head_mask_by_batch", lambda q, k, v, m: ((q @ k.mT).softmax(-1) * m[:, :, None, None]) @ v, f"{PLAIN}; gate bias[b, h]", extra=(ramp(2, 4),)),
    Spelling("key_factor", _weights_scaled, f"{PLAIN}; weight times bias[k]", extra=(ramp(9),)),
    Spelling("pair_factor", lambda q, k, v, m: (m * (q @ k.mT).softmax(-1)) @ v, f"{PLAIN}; weight times bias[h, q, k]", extra=(ramp(4, 7, 9),)),
    Spelling("score_factor", _times_scores, f"{PLAIN}; weight times s"),
    Spelling("dropout_in_place", lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3, False, inplace=True) @ v, PLAIN),
    Spelling("dropout_off", lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3, False) @ v, PLAIN),
)  # fmt: skip
