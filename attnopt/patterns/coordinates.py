"""Indices over a grid in the coordinates of a site: proven at every place where they matter.

A grid has the dimensions of an output, then one axis of columns (what the softmax or the sum runs over), then one of
features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp
from torch import fx

from attnopt import expr as ex
from attnopt.graph import value
from attnopt.patterns.grids import Array, Positions, Unproven, axis, combined, plain
from attnopt.patterns.traces import Piece, both
from attnopt.patterns.views import shape


@dataclass(frozen=True)
class Coordinate:
    """An index over the grid and the expression that it is."""

    at: Any
    expr: sp.Expr


class Axes:
    """The grid of an output's dimensions, of columns, and of features."""

    def __init__(self, output: fx.Node, columns: int) -> None:
        sizes = [int(n) for n in value(output).shape]
        self.output, self.rank, self.sizes = output, len(sizes), sizes
        self.everywhere = np.ones([1] * (self.rank + 2), dtype=bool)
        self.columns = axis(self.rank, columns, self.rank + 2)
        symbols = [sp.Symbol(f"_{i}", integer=True, nonnegative=True) for i in range(self.rank)]
        self.coordinates = [
            Coordinate(axis(i, n, self.rank + 2), x) for i, (n, x) in enumerate(zip(sizes, symbols, strict=True))
        ]

    def derived(self, query: int, softmax: fx.Node) -> list[Coordinate]:
        """The coordinates, chunks of queries and places in them, batch and heads as one, groups of heads."""
        found, own = list(self.coordinates), self.coordinates[query]
        for n in sorted({int(n) for n in value(softmax).shape if 1 < n < self.sizes[query]}):
            found.append(Coordinate(combined(np.floor_divide, own.at, n), ex.FloorDiv(own.expr, sp.Integer(n))))
            found.append(Coordinate(combined(np.mod, own.at, n), ex.Mod(own.expr, sp.Integer(n))))
        others = [i for i in range(self.rank) if i != query]
        for i in others:
            x = self.coordinates[i]
            groups = (n for n in range(2, self.sizes[i]) if self.sizes[i] % n == 0)
            found += [
                Coordinate(combined(np.floor_divide, x.at, n), ex.FloorDiv(x.expr, sp.Integer(n))) for n in groups
            ]
            for j in others:
                if i != j and min(self.sizes[i], self.sizes[j]) > 1:
                    y, n = self.coordinates[j], self.sizes[j]
                    found.append(Coordinate(x.at * n + y.at, x.expr * n + y.expr))
        return found

    def named(self, index: Iterable[sp.Expr | None]) -> set[int]:
        """The dimensions of the output whose coordinates an index mentions."""
        held = {x for i in index if i is not None for x in i.free_symbols}
        return {d for d, c in enumerate(self.coordinates) if c.expr in held}

    def moves(self, x: Any, dim: int) -> bool:
        """Whether an index may change along an axis."""
        return bool(np.ndim(plain(x)) and plain(x).shape[dim] > 1)

    def union(self, conditions: Iterable[Array]) -> Array:
        """Where any condition holds."""
        found = ~self.everywhere
        for holds in conditions:
            found = np.asarray(found | holds)
        return found

    def matrix(self, x: Any, query: int) -> Array:
        """What depends on the row and the column alone, as a matrix. Raises `Unproven` for what depends on more."""
        array = np.asarray(plain(x) if isinstance(x, (Positions, sp.Expr)) else x)
        array = array.reshape([1] * (self.rank + 2)) if not array.ndim else array
        rest = tuple(d for d in range(self.rank + 2) if d not in (query, self.rank))
        first = array[tuple(slice(1) if d in rest else slice(None) for d in range(array.ndim))]
        if not bool((array == first).all()):
            raise Unproven("which scores and values belong together differs between heads or batch entries")
        array = first
        return np.broadcast_to(array.squeeze(rest), (self.sizes[query], plain(self.columns).size))

    def spread(self, matrix: Array, query: int) -> Array:
        """A matrix of rows and columns as an array over the grid, one row where all are alike."""
        matrix = matrix[:1] if bool((matrix == matrix[:1]).all()) else matrix
        sizes = {query: len(matrix), self.rank: matrix.shape[1]}
        return matrix.reshape([sizes.get(d, 1) for d in range(self.rank + 2)])


def fit(at: Any, holds: Array, size: sp.Expr, coordinates: Sequence[Coordinate]) -> sp.Expr | None:
    """The expression that an index into a dimension of `size` is wherever `holds`; None if it is none of the known."""
    if size == 1:
        return sp.S.Zero
    for known in coordinates:
        if _equal(at, known.at, holds):
            return known.expr
    if not np.ndim(plain(at)):
        return sp.Integer(plain(at))
    inside = plain(at)[_reduced(holds, plain(at).shape)]
    return sp.Integer(int(inside[0])) if inside.size and bool((inside == inside[0]).all()) else None


def _equal(x: Any, y: Any, holds: Array) -> bool:
    """Whether two indices are the same wherever `holds`. One that varies along an axis is none that does not."""
    x, y = plain(x), plain(y)
    if any(n > 1 and m == 1 for n, m in zip(np.shape(y), np.shape(x) or [1] * np.ndim(y), strict=True)):
        return False
    same = np.asarray(x == y)
    return bool(same.all()) or bool(same.ndim and same[_reduced(holds, same.shape)].all())


def _reduced(holds: Array, shape: Sequence[int]) -> Array:
    """Where a condition holds anywhere along the axes on which an array of this shape is one element."""
    along = tuple(d for d, n in enumerate(shape) if n == 1)
    return np.broadcast_to(holds.any(axis=along, keepdims=True), shape)


def places(
    pieces: Sequence[Piece], coordinates: Sequence[Coordinate], spare: int = 0
) -> tuple[fx.Node, tuple[sp.Expr | None, ...], tuple[Any, ...], Array] | None:
    """The deepest node on the way of all pieces whose index there is known in the coordinates.

    Gives the node, its index as expressions and as arrays, and where it holds. `spare` dimensions may be unknown. A
    node whose dimensions are whole coordinates goes before deeper ones in which they are joined or cut.
    """
    holds = pieces[0].holds
    for piece in pieces[1:]:
        holds = np.asarray(holds | piece.holds)
    lengths = {
        c.expr: n for c in coordinates if c.expr != ex.k for n in np.shape(plain(c.at)) if n == np.size(plain(c.at)) > 1
    }
    other = None
    for node, _ in reversed(pieces[0].way):
        ways = [dict(piece.way).get(node) for piece in pieces]
        if any(way is None for way in ways):
            continue
        at = _merged([(piece.holds, way) for piece, way in zip(pieces, ways, strict=True)])  # type: ignore[misc]
        found = tuple(fit(i, holds, n, coordinates) for i, n in zip(at, shape(node), strict=True))
        if found.count(None) == spare:
            other = other or (node, found, at, holds)
            named = zip(found, shape(node), strict=True)
            if all(x is None or x.is_Integer or (x.is_Symbol and lengths.get(x, n) == n) for x, n in named):
                return node, found, at, holds
    return other


def _merged(found: Sequence[tuple[Array, tuple[Any, ...]]]) -> tuple[Any, ...]:
    """One index for pieces that hold at different places."""
    merged = [plain(i) for i in found[0][1]]
    for holds, index in found[1:]:
        for dim, i in enumerate(map(plain, index)):
            if not np.array_equal(i, merged[dim]):
                both(holds, np.asarray(i == merged[dim]))
                merged[dim] = np.where(holds, i, merged[dim])
    return tuple(Positions(np.asarray(i)) for i in merged)
