"""Indices as arrays: what a view does to the index of an element, for every element of a grid at once.

The grid's axes are coordinates; an index that depends on few of them is an array of few elements, since arrays
broadcast. The table of `views` substitutes such indices as it substitutes symbols. What no closed form describes,
as rows that a view of another width shears, is thereby known by enumeration, at the cost of the coordinates that
take part: batch, heads and features are none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy as sp
from torch import fx

from attnopt import expr as ex
from attnopt.graph import value
from attnopt.patterns.index import Sizes

Array = np.ndarray[Any, Any]
# What an element-wise combination of two indices may hold.
MOST = 1 << 24


class Unproven(Exception):  # noqa: N818  (an answer, not an error)
    """What enumeration would have to show does not hold, or would cost too much; the message says what."""


class Positions:
    """An index over the grid: integers in an array that broadcasts to it."""

    is_Integer = False  # noqa: N815  (what the table of views asks sympy's numbers)
    __slots__ = ("at",)

    def __init__(self, at: Array) -> None:
        self.at = at

    def __add__(self, other: Any) -> Positions:
        return self if _is(other, 0) else combined(np.add, self, other)

    def __sub__(self, other: Any) -> Positions:
        return self if _is(other, 0) else combined(np.subtract, self, other)

    def __rsub__(self, other: Any) -> Positions:
        return combined(np.subtract, other, self)

    def __mul__(self, other: Any) -> Positions:
        return self if _is(other, 1) else combined(np.multiply, self, other)

    __radd__, __rmul__ = __add__, __mul__


def _is(x: Any, number: int) -> bool:
    return not isinstance(x, Positions) and int(x) == number


def plain(x: Any) -> Any:
    """The integers of an index: an array, or one number."""
    return x.at if isinstance(x, Positions) else int(x)


def combined(rule: Callable[..., Array], x: Any, y: Any) -> Positions:
    """`rule` of two indices. Raises `Unproven` where that would be an array of too many elements."""
    x, y = plain(x), plain(y)
    count = math.prod(np.broadcast_shapes(np.shape(x), np.shape(y)))
    if count > MOST:
        raise Unproven(f"{count} places would have to be looked at; the most is {MOST}")
    return Positions(np.asarray(rule(x, y)))


def axis(place: int, count: int, rank: int) -> Positions:
    """The coordinate of one axis of a grid of `rank` axes. Places are below 2**31 in every tensor that is followed."""
    return Positions(np.arange(count, dtype=np.int32).reshape([count if i == place else 1 for i in range(rank)]))


def evaluated(e: sp.Basic, at: dict[sp.Symbol, Any]) -> Any:
    """An index expression at indices: sums, products, quotients and remainders. Raises `Unproven` for any other."""
    if e.is_Integer:
        return e
    if e in at:
        return at[e]
    parts = [evaluated(x, at) for x in e.args]
    if isinstance(e, (sp.Add, sp.Mul)):
        rule = np.add if isinstance(e, sp.Add) else np.multiply
        found = parts[0]
        for part in parts[1:]:
            found = combined(rule, found, part)
        return found
    if isinstance(e, (ex.FloorDiv, ex.Mod)):
        return combined(np.floor_divide if isinstance(e, ex.FloorDiv) else np.mod, *parts)
    raise Unproven(f"the index {e} is no sum, product or quotient of coordinates")


class Grid(Sizes):
    """Exact division and remainder of indices over a grid: of numbers, so that nothing is left to prove."""

    def __init__(self) -> None:
        super().__init__({})

    def div(self, x: Any, n: sp.Expr) -> Any:
        """`x // n`."""
        return combined(np.floor_divide, x, n)

    def mod(self, x: Any, n: sp.Expr) -> Any:
        """`x % n`; numpy divides by one number faster than it takes a remainder."""
        return combined(lambda x, n: x - x // n * n, x, n)

    def _regroup(self, index: Sequence[Any], old: Sequence[sp.Expr], new: Sequence[sp.Expr]) -> list[Any]:
        if sum(n != 1 for n in old) == 1 == sum(n != 1 for n in new):
            moved = next(x for x, n in zip(index, old, strict=True) if n != 1)
            return [sp.S.Zero if n == 1 else moved for n in new]
        flat: Any = sp.S.Zero
        for x, n in zip(index, old, strict=True):
            flat = flat * n + x
        parts: list[Any] = []
        for place, n in reversed(list(enumerate(new))):
            first = all(m == 1 for m in new[:place])
            parts.append(sp.S.Zero if n == 1 else flat if first else self.mod(flat, n))
            flat = flat if n == 1 else self.div(flat, n)
        return parts[::-1]


def strided(base: fx.Node, sizes: Sequence[int], strides: Sequence[int], index: Sequence[Any], holds: Array) -> Any:
    """The index into `base` of the element of `as_strided` at `index`; None if that may lie outside of `base`.

    The memory of `base` has to be that of its elements, each once. Strides of the new view that are multiples of a
    stride of `base` move in its outer dimensions only, where the others cannot add up to that stride: the two are
    then told apart without being combined.
    """
    seen = value(base)
    inner = sorted(
        (int(s), int(n), dim) for dim, (s, n) in enumerate(zip(seen.stride(), seen.shape, strict=True)) if n > 1
    )
    dense = all(s == math.prod(n for _, n, _ in inner[:place]) for place, (s, _, _) in enumerate(inner))
    if not inner or not dense:
        return None
    terms = [(int(s), int(n), x) for s, n, x in zip(strides, sizes, index, strict=True) if n > 1]
    cuts = [s for s, _, _ in inner if all(t < s or t % s == 0 for t, _, _ in terms)
            and sum(t * (n - 1) for t, n, _ in terms if t < s) < s]  # fmt: skip
    found: list[Any] = [sp.S.Zero] * seen.dim()
    for low, high in zip(cuts, [*cuts[1:], None], strict=True):
        offset: Any = sp.S.Zero
        for t, _, x in terms:
            if t >= low and (high is None or t < high):
                offset = x * (t // low) + offset
        dims = [(s // low, n, dim) for s, n, dim in inner if s >= low and (high is None or s < high)]
        extent = math.prod(n for _, n, _ in dims)
        outside = np.asarray((plain(offset) >= extent) | (plain(offset) < 0))
        if np.any(outside) and bool(np.any(outside & holds)):
            return None
        for s, n, dim in dims:
            digit = offset if s == 1 else Grid().div(offset, s)
            found[dim] = digit if s * n == extent else Grid().mod(digit, n)
    return found
