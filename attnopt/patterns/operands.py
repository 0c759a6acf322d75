"""Operands: the tensor behind a query, key or value, found by walking back through views.

A repeated key head (`expand`, `repeat_interleave`, `repeat_kv`) becomes a head table, so it is never expanded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy as sp
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.functional import WRITES
from attnopt.graph import op_name, value
from attnopt.patterns.lift import Lifter
from attnopt.patterns.views import Index, shape
from attnopt.region import Dim, Operand


@dataclass(frozen=True)
class Place:
    """A node, the index at which the site reads it, and the symbols of its position and its width."""

    node: fx.Node
    index: Index
    position: sp.Symbol
    feature: sp.Symbol


@dataclass(frozen=True)
class Resolved:
    """An operand by heads: `table[h]` is its head for query head h; `factor` is a constant scale taken off."""

    operand: Operand
    heads: int
    table: tuple[int, ...]
    factor: sp.Expr


def walk(place: Place, lifter: Lifter) -> list[tuple[fx.Node, Index, sp.Expr]]:
    """Every node on the way back through views and constant factors, with its index and the factor so far."""
    node, index, factor = place.node, place.index, sp.S.One
    steps = [(node, index, factor)]
    while True:
        if node.meta.get(WRITES):  # what is written into it is not in what it was made of
            return steps
        moved = lifter.step(node, index)
        if moved is None and op_name(node) in ("aten::mul", "aten::div"):
            moved = _scaled(node, index)
            if moved is not None:
                factor = factor * moved[2]
        if moved is None:
            return steps
        node, index = moved[0], tuple(moved[1])
        steps.append((node, index, factor))


def _scaled(node: fx.Node, index: Index) -> Any:
    """A product with a Python number: the tensor and the number."""
    x, y = node.args[0], node.args[1]
    if isinstance(y, fx.Node) and not isinstance(x, fx.Node) and op_name(node) == "aten::mul":
        x, y = y, x
    if not isinstance(x, fx.Node) or isinstance(y, (fx.Node, bool)) or not isinstance(y, (int, float)) or y == 0:
        return None
    if value(x).dtype != value(node).dtype or node.kwargs:
        return None
    number = ex.number(y)
    return x, index, number if op_name(node) == "aten::mul" else 1 / number


def resolve(place: Place, frame: Any, lifter: Lifter, role: str) -> Resolved | Decline:
    """The deepest node on the way whose dimensions are coordinates, one each; a query in its own heads if it can be."""
    best: Resolved | None = None
    other: Resolved | None = None
    for node, index, factor in walk(place, lifter):
        found = _clean(node, index, place, frame, factor)
        if found is not None and role == "query" and not own_heads(found, frame.heads):
            other = found
            continue
        best = found or best
    return best or other or Decline(f"the {role} is not a tensor by batch, head, position and feature", place.node)


def own_heads(found: Resolved, heads: int) -> bool:
    """Whether query head h is the operand's head h. An operand without heads is broadcast."""
    if found.heads == 1 and "h" not in found.operand.dims:
        return True
    return found.heads == heads and found.table == tuple(range(heads))


def _clean(node: fx.Node, index: Index, place: Place, frame: Any, factor: sp.Expr) -> Resolved | None:
    dims: list[Dim] = []
    table: tuple[int, ...] = (0,) * frame.heads
    heads = 1
    plain = {
        place.position: "q" if place.position == ex.q else "k",
        place.feature: "d",
        **{b: b.name for b in frame.batch},
    }
    for at, extent in zip(index, shape(node), strict=True):
        if at.is_Integer:
            dims.append(int(at))
        elif frame.fold is not None and at == frame.fold:
            dims.append(("b", "h"))
            heads, table = frame.heads, tuple(range(frame.heads))
        elif at in plain and plain[at] not in dims:
            dims.append(plain[at])
        elif at.free_symbols == {ex.h} and "h" not in dims and extent.is_Integer:
            dims.append("h")
            table = _table(at, frame.heads)
            heads = int(extent)
        else:
            return None
    if any(plain[c] not in dims and not frame.single(c) for c in (place.position, place.feature)):
        return None
    if not _whole(node, dims, frame, place, heads, table):
        return None
    return Resolved(Operand(node, tuple(dims)), heads, table, factor)


@functools.lru_cache(maxsize=1024)
def _table(at: sp.Expr, heads: int) -> tuple[int, ...]:
    """The head that each query head reads, from its expression in `h`: the same for every layer."""
    return tuple(int(at.subs(ex.h, i)) for i in range(heads))


def _whole(node: fx.Node, dims: list[Any], frame: Any, place: Place, heads: int, table: tuple[int, ...]) -> bool:
    """Whether each dimension is as long as its coordinate, so that no offset or remainder is hidden."""
    if ("b", "h") in dims and "h" in dims:
        return False
    extents = {"d": place.feature, "q": ex.q, "k": ex.k, **{b.name: b for b in frame.batch}}
    for dim, size in zip(dims, shape(node), strict=True):
        if isinstance(dim, str) and dim != "h" and not frame.fits(extents[dim], size):
            return False
    return "h" not in dims or max(table) < heads
