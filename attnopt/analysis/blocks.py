"""Tiles of queries by tiles of keys: which are empty, full or partial. Free of torch.

Classes follow from interval arithmetic over whole tiles, in one numpy expression for all of them: never an entry a pair
of query and key. They are sound: full means that every entry is kept, empty that none is, partial everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis.grid import Array
from attnopt.analysis.intervals import NUMERIC, Algebra, Box, Ends, decide, interval
from attnopt.analysis.solution import Below, Both, Either, From, Node
from attnopt.analysis.solve import solve

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class BlockMap:
    """The class of every tile.

    Attributes:
        classes: int8 `[..., tiles of queries, tiles of keys]` of `EMPTY`, `PARTIAL`, `FULL`; leading axes `b, h` where
            tables of data differ by them.
        block: queries and keys of one tile.
    """

    classes: Array
    block: tuple[int, int]

    def ranges(self, row: int, least: int = PARTIAL) -> tuple[tuple[int, int], ...]:
        """Disjoint ascending ranges `[first, last)` of key tiles of at least this class, for one tile of queries."""
        if self.classes.ndim != 2:
            raise ValueError(f"pick a batch entry and a head first: the map has {self.classes.ndim} axes.")
        edges = np.flatnonzero(np.diff(self.classes[row] >= least, prepend=False, append=False))
        return tuple((int(a), int(z)) for a, z in zip(edges[::2], edges[1::2], strict=True))

    def counts(self) -> tuple[int, int, int]:
        """How many tiles are empty, partial and full."""
        empty, partial, full = (int(np.count_nonzero(self.classes == c)) for c in (EMPTY, PARTIAL, FULL))
        return empty, partial, full


def tile_ends(size: int, block: int, algebra: Algebra = NUMERIC) -> Ends:
    """First and last coordinate of every tile, as int64 arrays."""
    first = algebra.places(size, block)
    return first, algebra.minimum(first + block, size) - 1


def block_map(
    keep: Boolean, sizes: Mapping[sp.Symbol, int], block: tuple[int, int], known: Box | None = None
) -> BlockMap:
    """The classes of all tiles of a mask.

    Args:
        keep: the mask.
        sizes: `n_q` and `n_k`, scalars, and `b` or `h` where one entry is meant; without, tiles are classed for all.
        block: queries and keys of one tile.
        known: ends of loads, broadcastable to `[..., tiles of queries, tiles of keys]` (see `tables`); what a load
            may be is unknown without.
    """
    classes = _classes(*outcome(keep, sizes, block, known or {}))
    shape = np.broadcast_shapes(
        classes.shape, tuple(-(-sizes[n] // x) for n, x in zip((ex.n_q, ex.n_k), block, strict=True))
    )
    return BlockMap(np.broadcast_to(classes, shape), block)


def outcome(
    keep: Boolean, sizes: Mapping[sp.Symbol, int], block: tuple[int, int], known: Box, algebra: Algebra = NUMERIC
) -> tuple[Any, Any]:
    """Whether some pair of each tile may be kept, and whether all surely are; broadcastable to all tiles."""
    rows, columns = (tile_ends(sizes[n], x, algebra) for n, x in zip((ex.n_q, ex.n_k), block, strict=True))
    return _outcome(keep, (rows[0].reshape(-1, 1), rows[1].reshape(-1, 1)), columns, sizes, known, algebra)


def tile_class(keep: Boolean, tile: tuple[int, int], keys: tuple[int, int], sizes: Mapping[sp.Symbol, int]) -> int:
    """The class of queries `[tile)` by `[keys)`."""
    return int(_classes(*_outcome(keep, (tile[0], tile[1] - 1), (keys[0], keys[1] - 1), sizes, {}, NUMERIC)))


def _classes(possible: Any, sure: Any) -> Array:
    return np.where(sure, FULL, np.where(possible, PARTIAL, EMPTY)).astype(np.int8)


def _outcome(
    keep: Boolean, queries: Ends, keys: Ends, sizes: Mapping[sp.Symbol, int], known: Box, algebra: Algebra
) -> tuple[Any, Any]:
    box: dict[sp.Basic, Ends] = {symbol: (value, value) for symbol, value in sizes.items()}
    for symbol, size in ((ex.b, ex.n_b), (ex.h, ex.n_h)):
        if symbol not in box:
            box[symbol] = (0, sizes[size] - 1 if size in sizes else np.inf)
    return _decide(solve(keep), {**box, ex.q: queries, ex.k: keys, **known}, algebra)


def _decide(node: Node, box: Box, algebra: Algebra) -> tuple[Any, Any]:
    if isinstance(node, (Both, Either)):
        join = algebra.both if isinstance(node, Both) else algebra.either
        parts = [_decide(n, box, algebra) for n in node.parts] or [(isinstance(node, Both),) * 2]
        return reduce(join, [p for p, _ in parts]), reduce(join, [s for _, s in parts])
    if not isinstance(node, (From, Below)):
        return decide(node.condition, box, algebra)
    end = interval(node.lo if isinstance(node, From) else node.hi, box, algebra)
    if end is None:
        return True, False
    (low, high), (first, last) = end, box[ex.k]
    if isinstance(node, From):
        return algebra.no(last < low), first >= high
    return algebra.no(first >= high), last < low
