"""Proof that a kernel, which reads through raw pointers, stays inside its captured tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.readable import show
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.spec import AttentionSpec

_ELEMENTS = 1 << 22


def by_data(spec: AttentionSpec) -> bool:
    """Whether an index depends on a tensor's content, so that its bounds have to be checked at every call."""
    return any(index.has(ex.Load) for load, _ in _guarded(spec) for index in load.args[1:])


def outside(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    data_only: bool = False,
) -> str | None:
    """The first load that leaves its tensor at these sizes, in words; None if none does.

    A load below a `Where` counts only where the condition takes that branch, as in the generated code.
    """
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    tensors = {c.name: t for c, t in zip(spec.captures, captures, strict=True)}
    sizes = dict(zip(ex.SIZES, extents, strict=True))
    sizes |= {ex.scalar(n): int(x) for n, x in zip(spec.scalars, scalars, strict=False)}
    for load, guards in _guarded(spec):
        name = load.args[0].name
        for dim, index in enumerate(load.args[1:]):
            size = tensors[name].shape[dim]
            if data_only and not index.has(ex.Load):
                continue
            if index in ex.COORDINATES:
                low, high = 0, extents[ex.COORDINATES.index(index)] - 1
                if high < size:
                    continue
            low, high = _range(index, guards, extents, sizes, tensors, q.device)
            if low <= high and (low < 0 or high >= size):
                return f"{show(load)} reads {name} at {low}..{high} along dimension {dim} of size {size}"
    return None


def _guarded(spec: AttentionSpec) -> Iterator[tuple[ex.Load, tuple[sp.Basic, ...]]]:
    stack: list[tuple[sp.Basic, tuple[sp.Basic, ...]]] = [(part, ()) for part in spec.expressions.values()]
    while stack:
        node, guards = stack.pop()
        if isinstance(node, ex.Where):
            condition, x, y = node.args
            stack += [(condition, guards), (x, (*guards, condition)), (y, (*guards, sp.Not(condition)))]
            continue
        if isinstance(node, ex.Load):
            yield node, guards
        stack += [(arg, guards) for arg in node.args]


def _range(
    index: sp.Expr,
    guards: tuple[sp.Basic, ...],
    extents: tuple[int, ...],
    sizes: dict[sp.Symbol, int],
    tensors: dict[str, Tensor],
    device: torch.device,
) -> tuple[int, int]:
    """Least and largest value of the index where the guards hold; (0, -1) where they never do."""
    used = [c for c in ex.COORDINATES if any(ex.depends(e, c) for e in (index, *guards))]
    guards = tuple(g for g in guards if not ex.depends(g, ex.s))
    spans = {
        c: torch.arange(n if c in used else 1, device=device) for c, n in zip(ex.COORDINATES, extents, strict=True)
    }
    if any(not span.numel() for span in spans.values()):
        return 0, -1
    others = max(1, spans[ex.b].numel() * spans[ex.h].numel() * spans[ex.k].numel())
    found: list[int] = []
    for rows in spans[ex.q].split(max(1, _ELEMENTS // others)):
        scope = Scope({**spans, ex.q: rows}, sizes, tensors, None, torch.float32)
        values = evaluate(index, scope)
        if guards:
            holds = functools.reduce(torch.logical_and, (evaluate(g, scope) for g in guards))
            values, holds = torch.broadcast_tensors(values, holds)
            values = values[holds]
        if values.numel():
            found += [int(values.min()), int(values.max())]
    return (min(found), max(found)) if found else (0, -1)
