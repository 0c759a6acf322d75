"""Linear attention at linear cost, with torch's own operators: one state for all keys, or one a chunk of causal keys.

Sums of a state are taken in fp64 over chunks of fp32 products, so that long sequences lose no digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.linear_form import CHUNK, LinearForm, linear_form, pays
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.reference import Sample, _heads, _scope, _without_scores
from attnopt.spec import AttentionSpec

# Keys whose products are summed in fp32 before the sums are added up in fp64.
_SUMMED = 512


class Linear:
    """Runs a spec that has a linear form."""

    name = "linear"

    def __init__(self, spec: AttentionSpec, form: LinearForm) -> None:
        self.spec = spec
        self.form = form

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, None]:
        return linear(self.spec, self.form, q, k, v, captures, scalars), None


def chosen(spec: AttentionSpec, q: Tensor, k: Tensor) -> Linear | None:
    """The backend, if the spec has a linear form that pays at these lengths."""
    form = linear_form(spec)
    if form is None or not pays(spec, q.shape[2], k.shape[2], form.causal):
        return None
    return Linear(spec, form)


def linear(
    spec: AttentionSpec, form: LinearForm, q: Tensor, k: Tensor, v: Tensor,
    captures: Sequence[Tensor] = (), scalars: Sequence[int] = (), sample: Sample | None = None,
    compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The attention of a spec with a linear form, `[B, Hq, n_q, d_v]` in q's dtype; inputs as for `reference`.

    Differentiable. `sample` may name the batch entries that q, k and v hold (`batch` with `whole_batch`), no more.
    `compute` is the dtype to compute in; by default fp32, fp64 for fp64.
    """
    scope = scope_of(spec, q, k, captures, scalars, sample, compute)
    divide = spec.normalizer.divide  # type: ignore[union-attr]
    found = sums(spec, form, scope, (q, k, v), divide.has(ex.t))
    total = found[..., -1:] if divide.has(ex.t) else found.new_empty(0)
    return finished(spec, scope, found[..., : v.shape[3]], total).to(q.dtype)


def finished(spec: AttentionSpec, scope: Scope, found: Tensor, total: Tensor) -> Tensor:
    """The attention from sums of values `[B, H, n_q, d_v]` and of weights `[B, H, n_q, 1]`: divided and gated."""
    divide = spec.normalizer.divide  # type: ignore[union-attr]
    if divide != 1:
        scope.totals = (total, total)
        found = found / evaluate(divide, scope).to(found.dtype)
    return found if spec.gate == 1 else found * evaluate(spec.gate, _without_scores(scope)).to(found.dtype)


def scope_of(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int],
    sample: Sample | None = None, compute: torch.dtype | None = None,
) -> Scope:  # fmt: skip
    """What the symbols of a spec stand for, without scores; in fp32, or fp64 for fp64, unless `compute` says else."""
    work = compute or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return _without_scores(_scope(spec, q, k, captures, scalars, sample or Sample(), work))


def sums(
    spec: AttentionSpec, form: LinearForm, scope: Scope, tensors: tuple[Tensor, Tensor, Tensor], total: bool
) -> Tensor:
    """`sum_k w(q,k) v[k]` in the dtype of the scope; with `total` the sum of the weights in one column more."""
    q, k, v = (x.to(scope.dtype) for x in tensors)
    heads = scope.axes[ex.h]
    queries = _times(q, form.query, scope)
    keys = _times(_heads(k, spec.heads.k_map, heads, True), form.key, scope, over_keys=True)
    values = _heads(v, spec.heads.v_map, heads, True)
    if total:
        # A value of one makes the sum of the weights.
        values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], -1)
    if form.offset is None:
        return queries @ _state(keys, values)
    wide = Scope(scope.axes, scope.sizes, scope.captures, None, torch.float64)
    offset = int(evaluate(form.offset, scope))
    if form.line is not None:
        later, sooner = (_grid(x, scope, torch.float64) for x in form.line)
        sooner = sooner.transpose(-1, -2).expand(-1, -1, k.shape[2], -1)
        return _by_line(queries, keys, values, (later.expand(-1, -1, q.shape[2], -1), sooner), offset)
    return _causal(queries, keys, values, _grid(form.rate, wide, torch.float64), offset)


def _times(x: Tensor, factor: sp.Expr, scope: Scope, over_keys: bool = False) -> Tensor:
    if factor == 1:
        return x
    found = _grid(factor, scope, x.dtype)
    return x * (found.transpose(-1, -2) if over_keys else found)


def _grid(factor: sp.Expr, scope: Scope, work: torch.dtype) -> Tensor:
    """An expression as `[B, H, Q, K]`, with size 1 where it does not vary."""
    found = evaluate(factor, scope).to(work)
    return found if found.dim() == 4 else found.expand(1, 1, 1, 1)


def _chunks(x: Tensor, size: int = CHUNK) -> Tensor:
    """`[B, H, n, d]` as `[B, H, chunks, size, d]`, zeros at the end."""
    if x.shape[2] % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.unflatten(2, (-1, size))


def _state(keys: Tensor, values: Tensor) -> Tensor:
    """`sum_k key (x) value`, `[B, H, d_qk, d_v]`."""
    size = min(_SUMMED, keys.shape[2])
    parts = _chunks(keys, size).transpose(-1, -2) @ _chunks(values, size)
    return parts.sum(2, dtype=torch.float64).to(keys.dtype)


def _aligned(x: Tensor, front: int, length: int) -> Tensor:
    """Zeros before, and zeros after or cut, so that the given number of positions is there."""
    if front == 0 and x.shape[2] == length:
        return x
    x = torch.nn.functional.pad(x, (0, 0, front, 0))[:, :, :length]
    return torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[2]))


def _causal(queries: Tensor, keys: Tensor, values: Tensor, rate: Tensor, offset: int) -> Tensor:
    """Each query with the keys up to `offset` places after its own. A zero key takes no part."""
    n_q, front = queries.shape[2], max(offset, 0)
    length = n_q + front
    queries = _aligned(queries, front, length)
    keys, values = (_aligned(x, max(-offset, 0), length) for x in (keys, values))
    q, k, v = (_chunks(x) for x in (queries, keys, values))
    steps = torch.arange(CHUNK, device=q.device, dtype=q.dtype)
    rates = rate.unsqueeze(-1)
    gap = (steps[:, None] - steps).clamp_min(0).double()
    decay = torch.exp(rates * (gap - offset)).tril().to(q.dtype)
    inside = (q @ k.transpose(-1, -2) * decay) @ v
    fading = torch.exp(rates * (CHUNK - 1 - steps).double().unsqueeze(-1)).to(q.dtype)
    made = (k * fading).transpose(-1, -2) @ v
    before = _running(made, torch.exp(rates.squeeze(-3) * CHUNK))
    growing = torch.exp(rates * (steps + 1 - offset).double().unsqueeze(-1)).to(q.dtype)
    found = inside + (q * growing) @ before
    return found.flatten(2, 3)[:, :, front:length]


def _by_line(queries: Tensor, keys: Tensor, values: Tensor, line: tuple[Tensor, Tensor], offset: int) -> Tensor:
    """As `_causal`, where `exp(line[0] - line[1])` is the decay between a query and a key.

    States are relative to the least of the line at the keys so far: no key grows in them, and a query grows no more
    than its greatest weight does.
    """
    n_q, n_k, front = queries.shape[2], keys.shape[2], max(offset, 0)
    length = n_q + front
    if n_k == 0 or length == 0:
        return values.new_zeros(*queries.shape[:3], values.shape[3])
    ones = keys.new_ones(1, 1, max(n_q, n_k), 1)
    floor = line[1].detach().cummin(2).values
    later, mine, q = (_chunks(_aligned(x, front, length)) for x in (line[0], ones[:, :, :n_q], queries))
    back = [_aligned(x, max(-offset, 0), length) for x in (line[1], ones[:, :, :n_k], keys, values)]
    sooner, there, k, v = (_chunks(x) for x in back)
    ends = torch.arange(CHUNK - 1, q.shape[2] * CHUNK, CHUNK, device=q.device) - max(-offset, 0)
    ends = floor[:, :, ends.clamp(0, n_k - 1)].unsqueeze(-1)
    before = torch.cat([floor[:, :, :1, None], ends[:, :, :-1]], 2)
    steps = torch.arange(CHUNK, device=q.device)
    seen = (steps[:, None] >= steps) & (mine * there.transpose(-1, -2) != 0)
    decay = torch.where(seen, torch.exp((later - sooner.transpose(-1, -2)).masked_fill(~seen, 0.0)), 0.0).to(q.dtype)
    inside = (q @ k.transpose(-1, -2) * decay) @ v
    fading = torch.exp(torch.where(there != 0, ends - sooner, 0.0)).to(q.dtype)
    states = _running((k * fading).transpose(-1, -2) @ v, torch.exp(ends - before))
    # Where no key is before a chunk there is nothing to grow.
    some = (states.detach() != 0).any(-1, keepdim=True).any(-2, keepdim=True)
    growing = torch.exp((later - before).masked_fill(~(some & (mine != 0)), 0.0)).to(q.dtype)
    found = inside + (q * growing) @ states
    return found.flatten(2, 3)[:, :, front:length]


def _running(made: Tensor, fade: Tensor) -> Tensor:
    """For each chunk the state that all chunks before it left, `[B, H, chunks, d_qk, d_v]`.

    `fade` is what is left of a state after a chunk, with an axis of chunks or the same for all.
    """
    state, states = torch.zeros_like(made[:, :, 0], dtype=torch.float64), []
    fades = fade.unbind(2) if fade.dim() == 5 else [fade] * made.shape[2]
    for part, left in zip(made.unbind(2), fades, strict=True):
        states.append(state.to(made.dtype))
        state = state * left + part
    return torch.stack(states, 2)
