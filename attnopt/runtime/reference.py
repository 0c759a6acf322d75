"""Every spec in eager PyTorch: the definition, the oracle and the fallback."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.errors import SpecError
from attnopt.runtime.chosen import chosen
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.shortcut import transformed
from attnopt.runtime.statistics import of_nothing, of_skipped, of_softmax
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Pointwise, Softmax


@dataclass(frozen=True)
class Sample:
    """The batch entries, query heads and query rows to compute, as ascending int64 tensors; None means all.

    With `whole_batch`, q, k and v hold only the entries `batch` of a batch of that size.
    """

    batch: torch.Tensor | None = None
    heads: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    whole_batch: int | None = None


def reference(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor] = (),
    scalars: Sequence[int] = (),
    *,
    rows: torch.Tensor | None = None,
    sample: Sample | None = None,
    compute: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention that `spec` describes. Differentiable in q, k, v and floating-point captures.

    With `select` it is dense attention under the mask that `runtime.chosen` makes; the choice has no gradient.
    A row is empty if it has no key whose logit is above -inf. It yields what `empty_row` says, unless a finite
    sink takes all of its weight: then zeros. Without any key at all every row yields zeros.

    Args:
        q: `[B, Hq, n_q, d_qk]`; k: `[B, Hk, n_k, d_qk]`; v: `[B, Hv, n_k, d_v]`; of one floating dtype.
        captures: one tensor for each of `spec.captures`, in order.
        scalars: one integer for each of `spec.scalars`; with dropout one more, the seed of the mask.
        rows: query rows to compute (shorthand for `Sample(rows=rows)`).
        sample: part of the result to compute; sizes and coordinates stay those of the whole.
        compute: dtype to compute in; by default fp32, fp64 for fp64.

    Returns:
        `out [B, Hq, n_q, d_v]` in q's dtype and `lse [B, Hq, n_q]` (natural logarithm of the denominator, sink
        included, -inf for an empty row) in fp32, or fp64 when computed so. Where the spec returns other side outputs
        of rows (`returns.py`), they stand in its place, several as `[B, Hq, n_q, n]`.
    """
    sample = sample or Sample(rows=rows)
    if spec.select is not None:
        if sample.whole_batch is not None:
            raise SpecError("a selection is made for whole inputs: use `analysis.chosen.lowered` for parts of a batch.")
        spec, captures = lowered(spec), [*captures, chosen(spec, q, k, captures, scalars)]
    work = compute or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    scope = _scope(spec, q, k, captures, scalars, sample, work)
    b_axis, h_axis, q_axis = (scope.axes[c] for c in (ex.b, ex.h, ex.q))
    batch = sample.batch if sample.whole_batch is None else None
    q_rows = _take(_take(_take(q, 0, batch), 1, sample.heads), 2, sample.rows).to(work)
    k_heads = _heads(_take(k, 0, batch), spec.heads.k_map, h_axis, sample.heads is None).to(work)
    v_heads = _heads(_take(v, 0, batch), spec.heads.v_map, h_axis, sample.heads is None).to(work)
    shape = (b_axis.numel(), h_axis.numel(), q_axis.numel(), k.shape[2])
    if k.shape[2] == 0:
        return _no_keys(spec, scope, q_rows, v_heads, q.dtype)
    normalise = _NORMALISE[type(spec.normalizer)]
    made, lse, empty = normalise(spec, scope, _products(spec, scope, q_rows, k_heads), shape)
    out = _apply(spec, scope, made, empty, v_heads, scalars)
    return _rows(spec, scope, out.to(q.dtype), lse)


def _rows(spec: AttentionSpec, scope: Scope, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result without the rows that are not computed."""
    if spec.rows != sp.true:
        left = ~evaluate(spec.rows, _without_scores(scope))
        out, lse = out.masked_fill(left, 0.0), torch.where(left, of_skipped(spec, lse), lse)
    return out, lse.squeeze(-1)


def _products(spec: AttentionSpec, scope: Scope, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`s [B, H, Q, K]`; the products of features of a mixed normaliser go into the scope."""
    if isinstance(spec.normalizer, Mixed):
        first = spec.heads.d_qk - spec.normalizer.features
        scope.far = q[..., first:] @ k[..., first:].transpose(-1, -2)
        q, k = q[..., :first], k[..., :first]
    return q @ k.transpose(-1, -2)


def _apply(
    spec: AttentionSpec,
    scope: Scope,
    weights: torch.Tensor,
    empty: torch.Tensor,
    v: torch.Tensor,
    scalars: Sequence[int],
) -> torch.Tensor:
    """The weighted sum of the values `[B, H, K, d_v]`, after what is done to weights and to the result."""
    if spec.weight != 1:
        weights = _fill_weights(spec.empty_row, weights, empty) * evaluate(spec.weight, scope).to(v.dtype)
    if spec.dropout:
        weights = weights * _dropout_mask(spec, tuple(weights.shape), scalars, weights)
    out = weights @ v
    if spec.weight == 1:
        out = _fill_empty(spec.empty_row, out, empty, v)
    return out if spec.gate == 1 else out * evaluate(spec.gate, _without_scores(scope)).to(v.dtype)


def _softmax(
    spec: AttentionSpec, scope: Scope, s: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights `[B, H, Q, K]`, side outputs `[B, H, Q, n]` and the mask of empty rows `[B, H, Q, 1]`."""
    accumulate = torch.float64 if s.dtype == torch.float64 else torch.float32
    scope.s = s
    logits = evaluate(spec.score, scope).to(s.dtype).to(accumulate).expand(shape)
    if spec.keep != sp.true:
        keep = evaluate(spec.keep, _without_scores(scope))
        logits = torch.where(keep, logits, torch.tensor(-torch.inf, dtype=accumulate, device=s.device))
    top = logits.detach().amax(-1, keepdim=True)
    sink = None
    if spec.normalizer.sink is not None:
        sink = evaluate(spec.normalizer.sink, _without_scores(scope)).to(accumulate)
        top = torch.maximum(top, sink.detach())
    empty = top == -torch.inf
    shift = torch.where(empty, torch.zeros_like(top), top)
    exps = torch.exp(logits - shift)
    total = exps.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - shift)
    safe = torch.where(empty, torch.ones_like(total), total)
    return (exps / safe).to(s.dtype), of_softmax(spec, logits, shift, exps, safe, sink, empty), empty


def _pointwise(
    spec: AttentionSpec, scope: Scope, s: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights `[B, H, Q, K]` that are the scores; lse of a row is the logarithm of what it is divided by."""
    accumulate = torch.float64 if s.dtype == torch.float64 else torch.float32
    scope.s = s
    # What a mask leaves out must not overflow where gradients are recorded: they would be zero times infinity.
    score = _bounded(spec.score, spec.keep) if torch.is_grad_enabled() else spec.score
    weights = evaluate(score, scope).to(s.dtype).to(accumulate).expand(shape)
    if spec.keep != sp.true:
        keep = evaluate(spec.keep, _without_scores(scope))
        weights = torch.where(keep, weights, torch.zeros((), dtype=accumulate, device=s.device))
    row = _without_scores(scope)
    row.totals = (weights.sum(-1, keepdim=True), weights.abs().sum(-1, keepdim=True))
    divide = evaluate(spec.normalizer.divide, row).to(accumulate).expand(*shape[:-1], 1)
    none = torch.zeros(*shape[:-1], 1, dtype=torch.bool, device=s.device)
    return (weights / divide).to(s.dtype), divide.abs().log(), none


@functools.lru_cache(maxsize=1024)
def _bounded(score: sp.Expr, keep: sp.Basic) -> sp.Expr:
    """The score with exponentials of zero, where they depend on places, for the keys that are left out."""
    found = [x for x in score.atoms(sp.exp) if ex.depends(x, ex.q, ex.k)]
    if keep == sp.true or not found:
        return score
    return score.xreplace({x: sp.exp(ex.Where(keep, x.args[0], sp.S.Zero)) for x in found})


def _mixed(
    spec: AttentionSpec, scope: Scope, s: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of which the near ones are exponentials and the others products of features; as `_softmax`."""
    assert isinstance(spec.normalizer, Mixed)
    assert scope.far is not None
    accumulate = torch.float64 if s.dtype == torch.float64 else torch.float32
    scope.s = s
    conditions = _without_scores(scope)
    keep, near = (evaluate(e, conditions).expand(shape) for e in (spec.keep, spec.normalizer.near))
    logits = evaluate(spec.score, scope).to(s.dtype).to(accumulate).expand(shape)
    logits = logits.masked_fill(~(keep & near), -torch.inf)
    far = scope.far.to(accumulate).masked_fill(~(keep & ~near), 0.0)
    beyond = far.sum(-1, keepdim=True)
    shift = torch.maximum(logits.detach().amax(-1, keepdim=True), beyond.detach().log())
    empty = shift == -torch.inf
    shift = shift.masked_fill(empty, 0.0)
    made = torch.exp(logits - shift) + far * torch.exp(-shift)
    total = made.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (total.log() + shift).masked_fill(empty, -torch.inf)
    return (made / total).to(s.dtype), lse, empty


_NORMALISE = {Softmax: _softmax, Pointwise: _pointwise, Mixed: _mixed}


def _fill_weights(policy: EmptyRow, weights: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    fill = {EmptyRow.ZERO: 0.0, EmptyRow.NAN: torch.nan, EmptyRow.UNIFORM: 1.0 / weights.shape[-1]}[policy]
    return torch.where(empty, torch.full_like(weights, fill), weights)


def _fill_empty(policy: EmptyRow, out: torch.Tensor, empty: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # Under `torch.export` and `torch.func` nobody can look whether there is such a row.
    if policy is EmptyRow.ZERO or not (torch.compiler.is_exporting() or transformed() or bool(empty.any())):
        return out
    filler = torch.full_like(out, torch.nan) if policy is EmptyRow.NAN else v.mean(-2, keepdim=True)
    return torch.where(empty, filler, out)


def _no_keys(
    spec: AttentionSpec, scope: Scope, q: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q @ q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    like, sink = q.new_empty((*q.shape[:3], 1), dtype=accumulate), None
    if isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is not None:
        sink = evaluate(spec.normalizer.sink, scope).to(accumulate)
    return out.to(dtype), of_nothing(spec, sink, like).squeeze(-1)


def _scope(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    captures: Sequence[torch.Tensor],
    scalars: Sequence[int],
    sample: Sample,
    work: torch.dtype,
) -> Scope:
    """What the spec's symbols stand for in a call with these operands; scores are not among them."""
    extents = (sample.whole_batch or q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    picks = (sample.batch, sample.heads, sample.rows, None)
    axes = {
        symbol: torch.arange(extent, device=q.device) if pick is None else pick.to(q.device)
        for symbol, extent, pick in zip(ex.COORDINATES, extents, picks, strict=True)
    }
    sizes = dict(zip(ex.SIZES, extents, strict=True))
    sizes |= {ex.scalar(name): int(value) for name, value in zip(spec.scalars, scalars, strict=False)}
    named = {c.name: tensor for c, tensor in zip(spec.captures, captures, strict=True)}
    whole = {c: n for c, n, pick in zip(ex.COORDINATES, extents, picks, strict=True) if pick is None}
    return Scope(axes, sizes, named, None, work, whole=whole)


def _without_scores(scope: Scope) -> Scope:
    """Masks, sinks and gates are evaluated at least in fp32, whatever the scores are rounded to."""
    wide = torch.float64 if scope.dtype == torch.float64 else torch.float32
    return replace(scope, s=None, dtype=wide, memo={}, totals=None)


def _take(tensor: torch.Tensor, dim: int, index: torch.Tensor | None) -> torch.Tensor:
    return tensor if index is None else tensor.index_select(dim, index.to(tensor.device))


def _heads(tensor: torch.Tensor, table: tuple[int, ...], heads: torch.Tensor, whole: bool) -> torch.Tensor:
    """The key or value head of every query head."""
    if whole and table == tuple(range(tensor.shape[1])):
        return tensor
    if whole and tensor.shape[1] == 1:
        return tensor.expand(-1, len(table), -1, -1)
    return tensor.index_select(1, torch.tensor(table, device=tensor.device)[heads])


def _dropout_mask(
    spec: AttentionSpec, shape: tuple[int, ...], scalars: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """Zeros with probability `spec.dropout`, else `1/(1 - dropout)`; a seed makes it repeatable."""
    seeds = list(scalars)[len(spec.scalars) :]
    generator = torch.Generator(like.device).manual_seed(int(seeds[0])) if seeds else None
    drawn = torch.rand(shape, generator=generator, device=like.device)
    return (drawn >= spec.dropout).to(like.dtype) / (1.0 - spec.dropout)
