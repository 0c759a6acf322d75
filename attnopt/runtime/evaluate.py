"""Expressions of a spec as torch tensors: one table from node to function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp
import torch
from sympy.logic.boolalg import BooleanFalse, BooleanTrue
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.readable import show


def _to_int(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.int64)


def _snap(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    nearest = torch.round(x.detach() / unit) * unit
    return torch.where(nearest.isfinite(), nearest + (x - x.detach()), x)


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., torch.Tensor]:
    return lambda *args: functools.reduce(function, args)


_TABLE: dict[type, Callable[..., torch.Tensor]] = {
    sp.Add: _fold(torch.add),
    sp.Mul: _fold(torch.mul),
    sp.Pow: torch.pow,
    ex.FloorDiv: lambda x, y: torch.div(x, y, rounding_mode="floor"),
    ex.Mod: torch.remainder,
    ex.Maximum: torch.maximum,
    ex.Minimum: torch.minimum,
    ex.Where: torch.where,
    ex.Trunc: lambda x: _to_int(torch.trunc(x)),
    ex.Snap: _snap,
    sp.floor: lambda x: _to_int(torch.floor(x)),
    sp.Abs: torch.abs,
    sp.exp: torch.exp,
    sp.log: torch.log,
    sp.tanh: torch.tanh,
    sp.sin: torch.sin,
    sp.cos: torch.cos,
    sp.sign: torch.sign,
    sp.erf: torch.erf,
    sp.And: _fold(torch.logical_and),
    sp.Or: _fold(torch.logical_or),
    sp.Not: torch.logical_not,
    sp.Ge: torch.ge,
    sp.Gt: torch.gt,
    sp.Eq: torch.eq,
    sp.Ne: torch.ne,
    sp.Le: torch.le,
    sp.Lt: torch.lt,
}


@dataclass
class Scope:
    """What the symbols of an expression stand for.

    Attributes:
        axes: the int64 values of `b, h, q, k`, one dimension each; the result has these four axes, or size 1.
        sizes: values of the size symbols and scalars.
        captures: captured tensors by name.
        s: raw scores, `[B, H, Q, K]`, where the expression has any.
        dtype: floating dtype of constants and of integers that meet floats.
        far: products of features, `[B, H, Q, K]`, where the normaliser is mixed.
        totals: sums of a row's weights and of their absolute values, `[B, H, Q, 1]`, where they are known.
        whole: the sizes of those axes that are 0, 1, 2 and so on: under `torch.export` no values can be looked at.
    """

    axes: Mapping[sp.Symbol, torch.Tensor]
    sizes: Mapping[sp.Symbol, int]
    captures: Mapping[str, torch.Tensor]
    s: torch.Tensor | None
    dtype: torch.dtype
    memo: dict[tuple[sp.Basic, torch.dtype], torch.Tensor] = field(default_factory=dict)
    far: torch.Tensor | None = None
    totals: tuple[torch.Tensor, torch.Tensor] | None = None
    whole: Mapping[sp.Symbol, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(iter(self.axes.values())).device

    def axis(self, symbol: sp.Symbol) -> torch.Tensor:
        """The coordinate's values along its own one of the four axes."""
        shape = [1, 1, 1, 1]
        shape[ex.COORDINATES.index(symbol)] = -1
        return self.axes[symbol].view(shape)


def evaluate(expr: sp.Basic, scope: Scope) -> torch.Tensor:
    """The value of `expr`, broadcastable to `[B, H, Q, K]`. Differentiable in `s` and in float captures."""
    # Rounding to an integer is done in fp32 whatever the compute dtype: a bucket may not move with precision.
    inside = torch.float32 if isinstance(expr, (ex.Trunc, sp.floor)) else scope.dtype
    key = (expr, inside)
    if key not in scope.memo:
        if inside is not scope.dtype:
            narrow = replace(scope, dtype=inside, memo={}, totals=None)
            scope.memo[key] = _evaluate(expr, narrow)
        else:
            scope.memo[key] = _evaluate(expr, scope)
    return scope.memo[key]


def _evaluate(expr: sp.Basic, scope: Scope) -> torch.Tensor:
    if isinstance(expr, ex.Load):
        return _load(expr, scope)
    if isinstance(expr, sp.Symbol):
        return _symbol(expr, scope)
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return torch.tensor(bool(expr), device=scope.device)
    if isinstance(expr, sp.Integer) and abs(int(expr)) < 2**63:  # finfo.min is an integer, but no int64
        return torch.tensor(int(expr), dtype=torch.int64, device=scope.device)
    if expr.is_number:
        return torch.tensor(float(expr), dtype=_constant_dtype(scope.dtype), device=scope.device)
    if isinstance(expr, (sp.Ne, sp.Eq)) and isinstance(expr.args[0], ex.IntLoad) and expr.args[1] == 0:
        value = _elements(expr.args[0], scope)
        if value.dtype == torch.bool:
            return value if isinstance(expr, sp.Ne) else ~value
    squashed = _squashed(expr)
    if squashed is not None:
        function, inner = squashed
        return function(_arguments(expr, [evaluate(inner, scope)], scope)[0])
    function = _TABLE.get(sp.exp if isinstance(expr, sp.exp) else expr.func)
    if function is None:
        raise SpecError(f"the reference cannot evaluate {expr.func.__name__} in {show(expr)}.")
    return function(*_arguments(expr, [evaluate(a, scope) for a in ex.sides(expr)], scope))


def _squashed(expr: sp.Basic) -> tuple[Callable[[torch.Tensor], torch.Tensor], sp.Basic] | None:
    """`1/(c + m exp(x))` and `log(c + m exp(x))`: as they stand their gradients overflow where the value does not."""
    reciprocal = isinstance(expr, sp.Pow) and expr.args[1] == -1
    if not reciprocal and not isinstance(expr, sp.log):
        return None
    c, rest = expr.args[0].as_coeff_Add()
    m, power = rest.as_coeff_Mul()
    if not isinstance(power, sp.exp) or not (c.is_positive and m.is_positive):
        return None
    shift, low, scale = math.log(m / c), math.log(c), 1 / float(c)
    if reciprocal:
        return lambda x: torch.sigmoid(-(x + shift)) * scale, power.args[0]
    return lambda x: torch.nn.functional.softplus(x + shift) + low, power.args[0]


_FLOAT_FUNCTIONS = (sp.exp, sp.log, sp.tanh, sp.sin, sp.cos, sp.erf)


def _arguments(expr: sp.Basic, args: list[torch.Tensor], scope: Scope) -> list[torch.Tensor]:
    """Integers as floats of the scope where a float is wanted, so that torch's default dtype plays no part."""
    mixed = any(a.is_floating_point() for a in args) and isinstance(expr, (sp.Add, sp.Mul, ex.Where, sp.Pow))
    if isinstance(expr, sp.Pow) and not args[0].is_floating_point() and not expr.args[1].is_nonnegative:
        # torch divides by tensors of integers in fp32, Python by sizes in double precision.
        sized = expr.args[0].free_symbols <= set(scope.sizes)
        return [args[0].to(_constant_dtype(scope.dtype) if sized else torch.float32), args[1]]
    if isinstance(expr, _FLOAT_FUNCTIONS) or mixed:
        dtype = _constant_dtype(scope.dtype)
        return [a if a.is_floating_point() or a.dtype == torch.bool else a.to(dtype) for a in args]
    return args


def _constant_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _symbol(symbol: sp.Symbol, scope: Scope) -> torch.Tensor:
    if symbol == ex.s:
        if scope.s is None:
            raise SpecError("this part of the spec may not mention s.")
        return scope.s
    if symbol in scope.axes:
        return scope.axis(symbol)
    if symbol in (ex.t, ex.a):
        if scope.totals is None:
            raise SpecError("this part of the spec may not mention the sums of a row's weights.")
        return scope.totals[symbol == ex.a]
    return torch.full((), scope.sizes[symbol], dtype=torch.int64, device=scope.device)


def _load(expr: ex.Load, scope: Scope) -> torch.Tensor:
    value = _elements(expr, scope)
    if isinstance(expr, ex.IntLoad):
        return value if value.dtype == torch.int64 else value.to(torch.int64)
    return value.to(scope.dtype)


def _elements(expr: ex.Load, scope: Scope) -> torch.Tensor:
    """What the load reads, in the dtype that the tensor has."""
    name, *indices = expr.args
    tensor = scope.captures[name.name]
    value = _slice(tensor, indices, scope)
    if value is None:
        value = _rows(tensor, indices, scope)
    if value is None:
        # An index may leave the tensor only where a `Where` discards the element, so any element will do there.
        places = [evaluate(i, scope).clamp(0, max(size - 1, 0)) for i, size in zip(indices, tensor.shape, strict=True)]
        value = tensor[tuple(places)] if places else tensor
    return value


def _rows(tensor: torch.Tensor, indices: list[sp.Expr], scope: Scope) -> torch.Tensor | None:
    """The load as a gather along one dimension, where all others are read as they lie: `line[h, k - q]`.

    Its indices are `[Q, K]` numbers, where those of a general gather are one for every head and dimension.
    """
    computed = [dim for dim, i in enumerate(indices) if i not in scope.whole]
    coordinates = [i for i in indices if i in scope.whole]
    if len(computed) != 1 or len(set(coordinates)) != len(coordinates) or not coordinates:
        return None
    (dim,) = computed
    sizes = [size for place, size in enumerate(tensor.shape) if place != dim]
    fit = [statically_known_true(scope.whole[c] == n) for c, n in zip(coordinates, sizes, strict=True)]
    if not all(fit) or ex.depends(indices[dim], *coordinates):
        return None
    index = evaluate(indices[dim], scope).clamp(0, max(tensor.shape[dim] - 1, 0))
    found = tensor.movedim(dim, -1).index_select(-1, index.flatten()).unflatten(-1, index.shape)
    count, axes = len(coordinates), list(ex.COORDINATES)
    order = [coordinates.index(c) if c in coordinates else count + axes.index(c) for c in axes]
    ones = [count + axes.index(c) for c in coordinates]
    return found.permute(order + ones).flatten(3)


def _slice(tensor: torch.Tensor, indices: list[sp.Expr], scope: Scope) -> torch.Tensor | None:
    """The load as selects along distinct coordinates, where it is one: its gradient is a sum, not a scatter."""
    coordinates = [i for i in indices if i in scope.axes]
    if len(set(coordinates)) != len(coordinates) or not all(i in scope.axes or i.is_Integer for i in indices):
        return None
    for dim in reversed(range(len(indices))):
        size, index = tensor.shape[dim], indices[dim]
        if index.is_Integer:
            if not 0 <= int(index) < size:
                return None
            tensor = tensor.select(dim, int(index))
            continue
        if index in scope.whole:
            extent = scope.whole[index]
            if not statically_known_true(extent <= size):
                return None
            tensor = tensor.narrow(dim, 0, extent)
            continue
        axis = scope.axes[index]
        if axis.numel() and int(axis[-1]) >= size:
            return None
        whole = axis.numel() and int(axis[-1]) - int(axis[0]) + 1 == axis.numel()
        tensor = tensor.narrow(dim, int(axis[0]), axis.numel()) if whole else tensor.index_select(dim, axis)
    order = [coordinates.index(c) for c in ex.COORDINATES if c in coordinates]
    tensor = tensor.permute(order)
    for position, coordinate in enumerate(ex.COORDINATES):
        if coordinate not in coordinates:
            tensor = tensor.unsqueeze(position)
    return tensor
