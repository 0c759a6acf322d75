"""Which small run-time tables class the tiles of a mask that depends on data. Free of torch.

A table is the least and the greatest value of one loaded expression in every block of its axis:

    Table(load=ids[b, q], axis="q")    min and max of ids over each block of queries, for every batch entry
    Table(load=mask[b, k], axis="k")   min and max over each block of keys: min 1 is all kept, max 0 is none
    Table(load=lengths[b], axis="")    one value (its own min and max) for every batch entry

It takes linear time to fill and `n/block` entries to keep; there is never an entry for a pair of query and key. How a
tile is classed from it is the interval arithmetic of `blocks`: put the ends into its box and evaluate `keep` over
tiles (`classes`). For the frequent masks that comes down to

    padding `mask[b, k] != 0`          empty if max == 0, full if min > 0 (or max < 0), else partial
    documents `ids[b,q] == ids[b,k]`   empty if the intervals of the query block and the key block do not meet, full if
                                       all four ends are equal, else partial
    lengths `k < lengths[b]`           empty if the tile starts at or after it, full if it ends before it

Besides, `rows` is the part of the mask that is a condition on keys alone: its first and last kept key bound the loop
over keys of every query. A load that depends on both q and k has no table; it leaves tiles partial.

`attnopt.runtime.tables.fill` computes what `plan` describes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL, BlockMap, block_map, outcome
from attnopt.analysis.intervals import NUMERIC, Algebra

AXES = {"q": ex.q, "k": ex.k}
# Ends are float64, which holds these and their products with small numbers exactly; what is larger counts as unknown.
LARGEST = 1 << 40


@dataclass(frozen=True)
class Table:
    """The ends of `load` over each block of `axis`, which is `q`, `k` or empty (one block).

    `over` holds those of `b` and `h` that the load depends on; the table has size 1 along the others.
    """

    load: ex.Load
    axis: str
    over: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to compute for one mask before its tiles are visited.

    Attributes:
        keep: the mask.
        tables: one for each load that the mask compares and that depends on at most one of q and k.
        rows: the clauses of `keep` on keys and their batch entry and head alone; true if there are none.
        complete: whether every load of the mask has a table.
    """

    keep: Boolean
    tables: tuple[Table, ...]
    rows: Boolean
    complete: bool


@lru_cache(maxsize=1024)
def plan(keep: Boolean) -> Plan:
    """The tables of a `keep` expression."""
    keep = ex.canon(keep)
    found = {load: _table(load) for load in _outer(keep)}
    clauses = [c for c in ex.conjuncts(keep) if c.has(ex.Load) and ex.depends(c, ex.k) and not ex.depends(c, ex.q)]
    lengths = [c for c in ex.conjuncts(keep) if not c.has(ex.Load) and ex.depends(c, ex.k) and not ex.depends(c, ex.q)]
    rows = sp.And(*clauses, *lengths) if clauses else sp.true
    return Plan(keep, tuple(t for t in found.values() if t is not None), rows, None not in found.values())


def classes(
    made: Plan, ends: Mapping[Table, tuple[Any, Any]], sizes: Mapping[sp.Symbol, int], block: tuple[int, int]
) -> BlockMap:
    """The class of every tile, `[B or 1, H or 1, tiles of queries, tiles of keys]`, from the filled tables.

    `ends` holds, for each table, arrays with the axes `b, h, blocks` (size 1 where the load does not depend on one).
    It is the definition of what a table means; a kernel evaluates the same comparisons one tile at a time.
    """
    found = block_map(made.keep, sizes, block, _known(made, ends, sizes, NUMERIC)).classes
    return BlockMap(found.reshape((1,) * (4 - found.ndim) + found.shape), block)


def classes_of(
    made: Plan, ends: Mapping[Table, tuple[Any, Any]], sizes: Mapping[sp.Symbol, int], block: tuple[int, int],
    algebra: Algebra,
) -> Any:  # fmt: skip
    """As `classes`, by the operations of another algebra: integers broadcastable to the axes of `BlockMap.classes`."""
    possible, sure = outcome(made.keep, sizes, block, _known(made, ends, sizes, algebra), algebra)
    return algebra.select(sure, FULL, algebra.select(possible, PARTIAL, EMPTY))


def _known(
    made: Plan, ends: Mapping[Table, tuple[Any, Any]], sizes: Mapping[sp.Symbol, int], algebra: Algebra
) -> dict[Any, Any]:
    """The ends of loads, and of those of `b` and `h` that the mask itself names, each along its own axis."""
    known: dict[Any, Any] = {table.load: tuple(_placed(table, x) for x in pair) for table, pair in ends.items()}
    bare = made.keep.xreplace({table.load: sp.S.Zero for table in ends})
    for symbol, size, axes in ((ex.b, ex.n_b, 3), (ex.h, ex.n_h, 2)):
        if ex.depends(bare, symbol) and size in sizes:  # classes of their own for each entry or head
            places = algebra.places(sizes[size], 1).reshape(-1, *(1,) * axes)
            known[symbol] = (places, places)
    return known


def _placed(table: Table, values: Any) -> Any:
    """`[b, h, blocks]` as `[b, h, blocks, 1]` or `[b, h, 1, blocks]`."""
    first, last = values.shape[:-1], values.shape[-1]
    return values.reshape(*first, last, 1) if table.axis == "q" else values.reshape(*first, 1, last)


def _outer(keep: Boolean) -> list[ex.Load]:
    """The loads that stand in no other load's index, in a stable order."""
    found: dict[ex.Load, None] = {}
    stack = [keep]
    while stack:
        node = stack.pop()
        if isinstance(node, ex.Load):
            found.setdefault(node)
        else:
            stack.extend(node.args)
    return [load for load in ex.loads(keep) if load in found]


def _table(load: ex.Load) -> Table | None:
    axes = [name for name, symbol in AXES.items() if ex.depends(load, symbol)]
    if len(axes) > 1 or load.has(ex.s):
        return None
    over = tuple(name for name, symbol in (("b", ex.b), ("h", ex.h)) if ex.depends(load, symbol))
    return Table(load, "".join(axes), over)
