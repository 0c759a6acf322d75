"""Expressions of a spec on a grid of coordinates, in numpy: what a mask is, entry by entry. Free of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy as sp
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from attnopt import expr as ex
from attnopt.errors import SpecError

Array = np.ndarray[Any, np.dtype[Any]]


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *args: functools.reduce(function, args)


_TABLE: dict[type, Callable[..., Any]] = {
    sp.Add: _fold(np.add),
    sp.Mul: _fold(np.multiply),
    sp.Pow: lambda x, y: np.power(np.asarray(x, np.float64), y),
    ex.FloorDiv: np.floor_divide,
    ex.Mod: np.mod,
    ex.Maximum: np.maximum,
    ex.Minimum: np.minimum,
    ex.Where: np.where,
    ex.Trunc: lambda x: np.trunc(x).astype(np.int64),
    ex.Snap: lambda x, unit: np.round(x / unit) * unit,
    sp.floor: lambda x: np.floor(x).astype(np.int64),
    sp.Abs: np.abs,
    sp.exp: np.exp,
    sp.log: np.log,
    sp.tanh: np.tanh,
    sp.sin: np.sin,
    sp.cos: np.cos,
    sp.sign: np.sign,
    sp.And: _fold(np.logical_and),
    sp.Or: _fold(np.logical_or),
    sp.Not: np.logical_not,
    sp.Ge: np.greater_equal,
    sp.Gt: np.greater,
    sp.Eq: np.equal,
    sp.Ne: np.not_equal,
    sp.Le: np.less_equal,
    sp.Lt: np.less,
}


@dataclass(frozen=True)
class Grid:
    """Every (b, h, q, k) of these sizes, with the captures and scalars that expressions refer to.

    Attributes:
        shape: the extents `(n_b, n_h, n_q, n_k)`.
        captures: arrays by name; integers are read as int64, floats as float64.
        scalars: integers by name.
    """

    shape: tuple[int, int, int, int]
    captures: Mapping[str, Array] = field(default_factory=dict)
    scalars: Mapping[str, int] = field(default_factory=dict)

    def value(self, expr: sp.Basic) -> Array:
        """The expression's value, broadcastable to `shape`. Raises `SpecError` for a node that has none here."""
        if isinstance(expr, ex.Load):
            return self._load(expr)
        if isinstance(expr, sp.Symbol):
            return self._symbol(expr)
        if isinstance(expr, (BooleanTrue, BooleanFalse)):
            return np.asarray(bool(expr))
        if isinstance(expr, sp.Integer) and abs(int(expr)) < 2**63:
            return np.asarray(int(expr), np.int64)
        if expr.is_number:
            return np.asarray(float(expr), np.float64)
        function = _TABLE.get(sp.exp if isinstance(expr, sp.exp) else expr.func)
        if function is None:
            raise SpecError(f"{expr.func.__name__} cannot be evaluated on a grid.")
        return np.asarray(function(*(self.value(a) for a in ex.sides(expr))))

    def dense(self, condition: sp.Basic) -> Array:
        """A condition as booleans of the whole `shape`."""
        return np.broadcast_to(self.value(condition), self.shape).astype(bool)

    def _symbol(self, symbol: sp.Symbol) -> Array:
        if symbol in ex.COORDINATES:
            place = ex.COORDINATES.index(symbol)
            return np.arange(self.shape[place]).reshape([-1 if i == place else 1 for i in range(4)])
        if symbol in ex.SIZES:
            return np.asarray(self.shape[ex.SIZES.index(symbol)], np.int64)
        return np.asarray(self.scalars[symbol.name], np.int64)

    def _load(self, expr: ex.Load) -> Array:
        name, *indices = expr.args
        array = self.captures[name.name]
        # An index may leave the array only where a `Where` discards the element, so any element will do there.
        sizes = zip(indices, array.shape, strict=True)
        places = tuple(np.clip(self.value(i), 0, max(size - 1, 0)) for i, size in sizes)
        found: Array = array[places].astype(np.int64 if isinstance(expr, ex.IntLoad) else np.float64)
        return found
