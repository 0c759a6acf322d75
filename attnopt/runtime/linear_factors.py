"""What kernels of linear attention take beside q, k and v: factors by key and by query, gates, rates and the offset."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.linear_form import LinearForm
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.linear import scope_of
from attnopt.runtime.lists import sizes_of
from attnopt.spec import AttentionSpec


@dataclass(frozen=True)
class Factors:
    """`by_key`, `by_query` and `gate` are fp32 `[B, H, n]`, expanded, or None for one; `rate` is fp64 `[B, H]` with
    sizes of 1 that are broadcast, or None for zero. `offset` is that of the causal mask, 0 without one. `line` is
    `LinearForm.line` for queries and for keys, fp32 `[B, H, n]`, expanded, or None.
    """

    by_key: Tensor | None = None
    by_query: Tensor | None = None
    gate: Tensor | None = None
    rate: Tensor | None = None
    offset: int = 0
    line: tuple[Tensor, Tensor] | None = None


def factors(
    spec: AttentionSpec, form: LinearForm, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
) -> Factors:
    """The factors of these inputs, on their device, differentiable by captures. Waits for no data of a device."""
    place = _offset(form.offset, tuple(sizes_of(spec, q, k, scalars).items())) if form.offset is not None else 0
    if form.rate == 0 and form.line is None and form.key == form.query == spec.gate == 1:
        return Factors(offset=place)
    scope = scope_of(spec, q, k, captures, scalars)
    wide = Scope(scope.axes, scope.sizes, scope.captures, None, torch.float64)
    by_key, by_query, gate = (
        _factor(e, scope, dim) for e, dim in ((form.key, 3), (form.query, 2), (spec.gate, 2))
    )  # fmt: skip
    rate = None if form.rate == 0 else _grid(form.rate, wide)[:, :, 0, 0].double()
    line = None
    if form.line is not None:
        line = _varying(form.line[0], scope, 2), _varying(form.line[1], scope, 3)
    return Factors(by_key, by_query, gate, rate, place, line)


@functools.lru_cache(maxsize=4096)
def _offset(offset: sp.Expr, sizes: tuple[tuple[sp.Symbol, int], ...]) -> int:
    return int(offset.xreplace({symbol: sp.Integer(size) for symbol, size in sizes}))


def _grid(expr: sp.Expr, scope: Scope) -> Tensor:
    found = evaluate(expr, scope)
    return found if found.dim() == 4 else found.expand(1, 1, 1, 1)


def _factor(expr: sp.Expr, scope: Scope, dim: int) -> Tensor | None:
    """As `_varying`; None for one."""
    return None if expr == 1 else _varying(expr, scope, dim)


def _varying(expr: sp.Expr, scope: Scope, dim: int) -> Tensor:
    """An expression as fp32 `[B, H, n]`, expanded. `dim` is the axis of its positions."""
    made = _grid(expr, scope).to(torch.float32).select(5 - dim, 0)
    sizes = [scope.axes[c].numel() for c in (ex.b, ex.h, ex.q if dim == 2 else ex.k)]
    return made.expand(sizes)
