"""A selection behind a reshape or a repetition: dimensions are regrouped, and repeated heads are repeated less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import sympy as sp
from torch import fx

from attnopt.graph import arguments, aten, op_name, value
from attnopt.patterns.views import shape

Keep = tuple[int, ...]


class Maker(Protocol):
    """What a rule may ask of the restrictor."""

    def part(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        """The input restricted."""
        ...

    def again(self, node: fx.Node, changed: dict[fx.Node, fx.Node], **named: Any) -> fx.Node:
        """The node's call with other inputs, and other arguments by name."""
        ...

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call."""
        ...

    def constant(self, like: fx.Node, table: Keep) -> fx.Node:
        """A tensor of numbers."""
        ...


Rule = Callable[[Maker, fx.Node, int, Keep], "fx.Node | None"]


def source_of(node: fx.Node) -> fx.Node:
    """The tensor that a view or a reduction reads."""
    a = arguments(node)
    found = a.get("self", a.get("input"))
    assert isinstance(found, fx.Node)
    return found


def reshaped(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    """A selection behind a reshape: of each dimension that the reshape joined or split."""
    source = source_of(node)
    group = _group(shape(source), shape(node), dim)
    sizes = _sizes(node)
    if group is None or sizes is None or "dtype" in arguments(node):
        return None
    inner, outer = group
    if not inner:
        return None
    new = [int(shape(node)[d]) for d in outer]
    old = [int(shape(source)[d]) for d in inner]
    chosen = [keep if d == dim else range(n) for d, n in zip(outer, new, strict=True)]
    strides = [math.prod(new[i + 1 :]) for i in range(len(new))]
    flat = tuple(sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*chosen))
    parts = _product(flat, old)
    sizes[dim] = len(keep)
    if parts is None:
        return _repeated(r, node, source, inner, dim, keep)
    for d, part in zip(inner, parts, strict=True):
        source = r.part(source, d, part)
    return r.emit(node, aten.reshape.default, source, sizes)


def _repeated(r: Maker, node: fx.Node, source: fx.Node, inner: list[int], dim: int, keep: Keep) -> fx.Node | None:
    """Query heads of repeated key heads: each key head that is still used, repeated as often as it is used."""
    if len(inner) != 2 or op_name(source) != "aten::expand" or value(source).dim() != value(node).dim() + 1:
        return None
    heads, copies = inner
    base = source_of(source)
    if value(base).dim() != value(source).dim() or value(base).shape[copies] != 1 or heads != dim:
        return None
    if any(not isinstance(n, int) and d in (heads, copies) for d, n in enumerate(value(base).shape)):
        return None
    table = tuple(i // value(source).shape[copies] for i in keep)
    kept = tuple(sorted(set(table)))
    small = r.emit(node, aten.squeeze.dim, r.part(base, heads, kept), copies)
    return copied(r, node, small, dim, tuple(kept.index(i) for i in table), len(kept))


def copied(r: Maker, node: fx.Node, small: fx.Node, dim: int, table: Keep, count: int) -> fx.Node:
    """Each head as often as the table says: evenly by `repeat_interleave`, else by a table."""
    each = len(table) // count
    if table == tuple(i // each for i in range(count * each)):
        return small if each == 1 else r.emit(node, aten.repeat_interleave.self_int, small, each, dim)
    return r.emit(node, aten.index_select.default, small, dim, r.constant(node, table))


def interleaved(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    """A selection behind `repeat_interleave` by a number."""
    a, source = arguments(node), source_of(node)
    if not isinstance(a["repeats"], int) or a.get("dim") is None:
        return None
    if dim != a["dim"] % value(node).dim():
        return r.again(node, {source: r.part(source, dim, keep)})
    table = tuple(i // a["repeats"] for i in keep)
    kept = tuple(sorted(set(table)))
    return copied(r, node, r.part(source, dim, kept), dim, tuple(kept.index(i) for i in table), len(kept))


def _sizes(node: fx.Node) -> list[Any] | None:
    """The sizes that a reshape asks for, as arguments; None where a symbolic one has no node."""
    a = arguments(node)
    given = a.get("size", a.get("shape"))
    if given is not None:
        return list(given)
    sizes = list(value(node).shape)
    loose = [d for d, n in enumerate(sizes) if not isinstance(n, int)]
    if len(loose) > 1:
        return None
    return [-1 if d in loose else n for d, n in enumerate(sizes)]


def _group(old: list[sp.Expr], new: list[sp.Expr], dim: int) -> tuple[list[int], list[int]] | None:
    """The fewest neighbouring dimensions, old and new, that hold `dim` and have the same number of elements."""
    i = j = 0
    while j < len(new):
        left, right = i, j
        a = old[i] if i < len(old) else sp.S.One
        b = new[j]
        i, j = i + 1, j + 1
        while sp.expand(a - b) != 0:
            if i < len(old) and (j >= len(new) or _whole(b / a)):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                return None
        if right <= dim < j:
            inner, outer = list(range(left, min(i, len(old)))), list(range(right, j))
            known = all(old[d].is_Integer for d in inner) and all(new[d].is_Integer for d in outer)
            return (inner, outer) if known else None
    return None


def _whole(quotient: sp.Expr) -> bool:
    reduced = sp.cancel(quotient)
    return bool(reduced.is_polynomial() and sp.denom(reduced) == 1)


def _product(flat: Keep, sizes: list[int]) -> list[Keep] | None:
    """One selection a dimension whose product is the flat selection; None if there is none."""
    places: list[Keep] = []
    rest = list(flat)
    for n in reversed(sizes):
        places.append(tuple(dict.fromkeys(x % n for x in rest)))
        rest = [x // n for x in rest]
    places.reverse()
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    made = tuple(sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*places))
    return places if made == flat else None
