"""The blocks of keys that a `Select` chooses, in operators that have an ONNX form at any size.

`runtime.chosen` is the definition; it asks numpy which tiles a mask leaves empty and looks at the number of blocks.
Here both are tensors: sizes may be symbols of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy as sp
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis import tables
from attnopt.errors import SpecError
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.reference import Sample, _scope, _without_scores
from attnopt.spec import AttentionSpec, Capture


def as_mask(spec: AttentionSpec) -> AttentionSpec:
    """The spec without `select`: the last capture, bool `[B, Hq, n_q, n_k]`, is what was chosen."""
    if spec.select is None:
        return spec
    taken = {*(c.name for c in spec.captures), *spec.scalars}
    name = next(n for n in ("chosen", *(f"chosen{i}" for i in range(len(taken)))) if n not in taken)
    kept = sp.Ne(ex.load(name, ex.b, ex.h, ex.q, ex.k, integer=True), 0)
    captures = (*spec.captures, Capture(name, "bool", (None, spec.heads.q, None, None)))
    return replace(spec, keep=sp.And(spec.keep, kept), captures=captures, select=None).canonical()


def mask(spec: AttentionSpec, q: Tensor, k: Tensor, scope: Scope) -> Tensor:
    """What `spec.select` chooses, bool `[B, Hq, n_q, n_k]`.

    Args:
        q, k: `[B, Hq, n_q, d]` and `[B, Hk, n_k, d]`.
        scope: of the spec, without scores. Raises `SpecError` for a mask whose empty tiles it cannot tell.
    """
    select, heads = spec.select, spec.heads
    assert select is not None
    tiles, blocks = _Cut(q.shape[2], select.tile, q.device), _Cut(k.shape[2], select.block, k.device)
    means, count = _means(k, blocks, _kept(spec, scope))
    allowed = _possible(spec.keep, scope, tiles, blocks) & (count > 0)
    forced = _forced(spec, scope, tiles, allowed)
    queries, _ = _means(q, tiles, None)
    if select.shared:
        groups = [torch.tensor([h for h in range(heads.q) if heads.k_map[h] == g] or [0]) for g in range(heads.k)]
        queries = torch.cat([queries.index_select(1, g).mean(1, keepdim=True) for g in groups], 1)
    elif heads.k_map != tuple(range(heads.k)):
        means = means.index_select(1, torch.tensor(heads.k_map))
    scores = queries @ means.transpose(-1, -2) * float(select.scale)
    allowed, forced = allowed.expand(scores.shape), forced.expand(scores.shape)
    amount = torch.tensor([float(x) for x in select.amount]).reshape(1, -1, 1, 1)
    picked = _PICK[select.rule](scores, allowed, forced, amount, count)
    picked = picked.index_select(1, torch.tensor(heads.k_map)) if select.shared else picked
    return picked.index_select(2, tiles.of).index_select(3, blocks.of)


class _Cut:
    """Positions cut into parts of `width`: `of` says to which part each belongs, `first` and `last` where parts end."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self.size, self.width = size, width
        self.count = (size + width - 1) // width
        self.of = torch.arange(size, device=device) // width
        self.first = torch.arange(self.count, device=device) * width
        self.last = (self.first + (width - 1)).clamp(max=size - 1)

    def apart(self, x: Tensor, dim: int) -> Tensor:
        """The dimension of positions as `[parts, width]`; the last position stands for those that are missing."""
        whole = torch.arange(self.count * self.width, device=x.device).clamp(max=self.size - 1)
        return x.index_select(dim, whole).unflatten(dim, (-1, self.width))

    def real(self) -> Tensor:
        """`[parts, width]`: 1 where there is a position."""
        places = torch.arange(self.count * self.width, device=self.of.device)
        return (places < self.size).to(torch.float32).unflatten(0, (-1, self.width))


def _means(x: Tensor, cut: _Cut, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of every part `[B, H, parts, D]`, and how many were taken, `[B or 1, 1, 1, parts]`."""
    weight = cut.real()[None]
    if kept is not None:
        weight = weight * cut.apart(kept.to(torch.float32), 1)
    count = weight.sum(-1)
    # What does not count may be anything, NaN included.
    held = torch.where(weight[:, None, :, :, None] == 0, 0.0, cut.apart(x.to(torch.float32), 2))
    return held.sum(3) / count.clamp(min=1.0)[:, None, :, None], count[:, None, None]


def _kept(spec: AttentionSpec, scope: Scope) -> Tensor | None:
    """Which keys count in the means, `[B or 1, n_k]`; None for all."""
    clauses = [c for c in ex.conjuncts(tables.plan(spec.keep).rows) if not ex.depends(c, ex.h)]
    if sp.And(*clauses) == sp.true:
        return None
    return evaluate(sp.And(*clauses), scope)[:, 0, 0]


def _possible(keep: Boolean, scope: Scope, tiles: _Cut, blocks: _Cut) -> Tensor:
    """Which blocks the mask may allow a tile, `[B or 1, H or 1, tiles or 1, blocks or 1]`, as `tables.classes` does."""
    if isinstance(keep, (sp.And, sp.Or)):
        parts = [_possible(part, scope, tiles, blocks) for part in keep.args]
        found = parts[0]
        for part in parts[1:]:
            found = found & part if isinstance(keep, sp.And) else found | part
        return found
    if keep in (sp.true, sp.false):
        return torch.full((1, 1, 1, 1), keep == sp.true)
    if not ex.depends(keep, ex.q) and isinstance(keep, (sp.Ne, sp.Eq)) and keep.has(ex.Load):
        return blocks.apart(evaluate(keep, scope), 3).any(-1)
    slope = {x: sp.diff(keep.args[0] - keep.args[1], x) for x in (ex.q, ex.k)} if _compares(keep) else {}
    if not slope or not all(x.is_Integer for x in slope.values()):
        raise SpecError(f"blocks cannot be chosen in ONNX under the mask {keep}.")
    high = isinstance(keep, (sp.Ge, sp.Gt))
    ends = {
        x: (cut.last if (slope[x] > 0) == high else cut.first) for x, cut in ((ex.q, tiles), (ex.k, blocks))
    }  # fmt: skip
    return evaluate(keep, replace(scope, axes={**scope.axes, **ends}, whole={}, memo={}))


def _compares(keep: Boolean) -> bool:
    return isinstance(keep, (sp.Ge, sp.Gt, sp.Le, sp.Lt)) and not keep.has(ex.Load, ex.FloorDiv, ex.Mod)


def _forced(spec: AttentionSpec, scope: Scope, tiles: _Cut, allowed: Tensor) -> Tensor:
    """Candidates that are kept in any case."""
    select = spec.select
    assert select is not None
    forced = torch.zeros_like(allowed)
    if select.first:
        forced = forced | (allowed.to(torch.int64).cumsum(-1) <= select.first)
    if select.own is not None:
        own = evaluate(select.own, scope)
        own = tiles.apart((own + torch.zeros_like(scope.axis(ex.q)))[..., 0], 2) // select.block
        places = torch.arange(allowed.shape[3], device=allowed.device)
        low, high = own.amin(-1)[..., None], own.amax(-1)[..., None]
        forced = forced | (places >= low) & (places <= high)
    return forced & allowed


Pick = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _topk(scores: Tensor, allowed: Tensor, forced: Tensor, amount: Tensor, count: Tensor) -> Tensor:
    return (_order(scores, allowed, forced).rank < amount) & allowed | forced


def _mass(scores: Tensor, allowed: Tensor, forced: Tensor, amount: Tensor, count: Tensor) -> Tensor:
    logits = scores + count.log()
    shares = torch.where(allowed, logits, -torch.inf).softmax(-1)
    order = _order(logits, allowed, forced)
    ordered = shares.gather(-1, order.places)
    reached = (ordered.cumsum(-1) - ordered).gather(-1, order.rank)
    return (reached < amount) & allowed | forced


@dataclass(frozen=True)
class _Order:
    """`places` of the blocks from the best to the worst, and each block's `rank`."""

    places: Tensor
    rank: Tensor


def _order(scores: Tensor, allowed: Tensor, forced: Tensor) -> _Order:
    """Equal ones in ascending order: ONNX's TopK breaks ties by the lower index."""
    known = torch.where(scores.isnan(), torch.inf, scores).clamp(min=torch.finfo(torch.float32).min)
    known = torch.where(allowed, known, -torch.inf)
    known = torch.where(forced, torch.inf, known)
    places = _descending(known)
    return _Order(places, _descending(-places.to(torch.float32)))


def _descending(x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        return torch.sort(x, dim=-1, descending=True).indices
    return torch.sort(x, dim=-1, descending=True, stable=True).indices


_PICK: dict[str, Pick] = {"topk": _topk, "mass": _mass}


def operands(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
) -> tuple[AttentionSpec, list[Tensor]]:
    """The spec and captures with the choice as one of them; as they are where nothing is chosen."""
    if spec.select is None:
        return spec, list(captures)
    scope = _without_scores(_scope(spec, q, k, captures, scalars, Sample(), torch.float32))
    return as_mask(spec), [*captures, mask(spec, q, k, scope)]
