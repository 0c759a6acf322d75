"""The gather table: operators whose element is picked by position, from an input by data or by comparison.

An entry takes the lifter, the call, its arguments by name and the index; it gives the element, or None if unknown.
"""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.graph import op_name, value
from attnopt.patterns.index import Sizes, nonnegative
from attnopt.patterns.views import Index, shape, size


def trailing(node: fx.Node, index: Index) -> Index:
    """The index into an operand that is broadcast to the result's shape."""
    sizes = shape(node)
    return tuple(sp.S.Zero if n == 1 else i for n, i in zip(sizes, index[len(index) - len(sizes) :], strict=True))


def plain_gradient(a: dict[str, Any]) -> bool:
    """Whether the gradient of an embedding is that of reading its table: one that skips or weighs rows has its own."""
    return a["padding_idx"] < 0 and not a["scale_grad_by_freq"] and not a["sparse"]


def _embedding(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    if not plain_gradient(a):
        return None
    row = lifter.lift(a["indices"], index[:-1])
    return lifter.lift(a["weight"], (row, index[-1]))


def _index(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    picks = a["indices"]
    places = [i for i, p in enumerate(picks) if p is not None]
    if places != list(range(places[0], places[-1] + 1)) or any(value(picks[p]).dtype == torch.bool for p in places):
        return None
    rank = max(value(picks[p]).dim() for p in places)
    first = places[0]
    where = index[first : first + rank]
    old: list[sp.Basic] = list(index[:first])
    for p in places:
        at = lifter.lift(picks[p], trailing(picks[p], where))
        old.append(from_end(at, shape(a["self"])[p], lifter.sizes))
    return lifter.lift(a["self"], (*old, *index[first + rank :]))


def from_end(at: sp.Basic, extent: sp.Expr, sizes: Sizes) -> sp.Basic:
    """A place that may count from the end, as one that counts from the start."""
    bounds = sizes.bounds(at) if isinstance(at, sp.Expr) else None
    if bounds is not None and bounds[0].is_nonnegative:
        return at
    if at.has(ex.Load):
        raise NotImplementedError("an index read from data, which may count from the end")
    return ex.Where(sp.Lt(at, 0), at + extent, at)


def _index_select(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    dim = a["dim"] % len(index)
    at = lifter.lift(a["index"], (index[dim],))
    return lifter.lift(a["self"], (*index[:dim], at, *index[dim + 1 :]))


def _triangle(lower: bool) -> Any:
    def rule(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic:
        inner, diagonal = lifter.lift(a["self"], index), lifter.lift(a["diagonal"], ())
        gap = index[-1] - index[-2] - diagonal
        inside = sp.Le(gap, 0) if lower else sp.Ge(gap, 0)
        if ex.is_boolean(inner):
            return sp.And(inner, inside)
        return ex.Where(inside, inner, sp.S.Zero)

    return rule


def _cat(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    dim = a["dim"] % len(index)
    parts, offsets, at = a["tensors"], [], sp.S.Zero
    for part in parts:
        offsets.append(at)
        at = at + shape(part)[dim]
    moved = [(*index[:dim], sp.expand(index[dim] - o), *index[dim + 1 :]) for o in offsets]
    for part, where in zip(parts, moved, strict=True):
        if _within(where[dim], shape(part)[dim], lifter.sizes):
            return lifter.lift(part, where)
    found = lifter.lift(parts[-1], moved[-1])
    for part, where, end in list(zip(parts, moved, offsets[1:], strict=False))[::-1]:
        found = _either(sp.Lt(index[dim], end), lifter.lift(part, where), found)
    return found


def _stack(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    dim = a["dim"] % len(index)
    rest, at = (*index[:dim], *index[dim + 1 :]), index[dim]
    *parts, found = (lifter.lift(t, rest) for t in a["tensors"])
    for place, part in reversed(list(enumerate(parts))):
        found = _either(sp.Eq(at, place), part, found)
    return found


def _outer(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    x, y = (lifter.lift(a[name], (at,)) for name, at in zip(("self", "vec2"), index, strict=True))
    return sp.And(x, y) if ex.is_boolean(x) and ex.is_boolean(y) else ex.as_number(x) * ex.as_number(y)


def _within(at: sp.Expr, extent: sp.Expr, sizes: Sizes) -> bool:
    """Whether an index is inside a dimension for certain."""
    bounds = sizes.bounds(at)
    return bounds is not None and nonnegative(bounds[0]) and nonnegative(sp.expand(extent - 1 - bounds[1]))


def _outside(at: sp.Expr, extent: sp.Expr, sizes: Sizes) -> bool:
    """Whether an index is outside a dimension for certain."""
    bounds = sizes.bounds(at)
    return bounds is not None and (nonnegative(sp.expand(bounds[0] - extent)) or nonnegative(-1 - bounds[1]))


def _pad(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    """A border of one number; one whose widths are known only at run time too."""
    amounts, source = [size(x) for x in a["pad"]], shape(a["self"])
    if a.get("mode", "constant") != "constant":
        return None
    at, inside = list(index), sp.true
    for place in range(len(amounts) // 2):
        dim = len(index) - 1 - place
        at[dim] = sp.expand(index[dim] - amounts[2 * place])
        if _outside(at[dim], source[dim], lifter.sizes):
            inside = sp.false
        elif not _within(at[dim], source[dim], lifter.sizes):
            inside = sp.And(inside, sp.Ge(at[dim], 0), sp.Lt(at[dim], source[dim]))
    fill = lifter.lift(a.get("value") or 0, ())
    if inside == sp.false:
        return ex.truth(fill) if value(node).dtype == torch.bool else fill
    found = lifter.lift(a["self"], tuple(at))
    return _either(inside, found, ex.truth(fill) if ex.is_boolean(found) else fill)


def _scatter(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    dim = a["dim"] % len(index)
    if op_name(node) == "aten::select_scatter":
        at = size(a["index"]) % shape(node)[dim]
        inside, inner = sp.Eq(index[dim], at), (*index[:dim], *index[dim + 1 :])
    else:
        start, stop = size(a["start"] or 0), shape(a["src"])[dim]
        if a["step"] != 1 or start.is_negative:
            return None
        above = sp.true if start == 0 else sp.Ge(index[dim], start)
        below = sp.true if sp.expand(start + stop - shape(node)[dim]) == 0 else sp.Lt(index[dim], start + stop)
        inside = sp.And(above, below)
        inner = (*index[:dim], index[dim] - start, *index[dim + 1 :])
    return _either(inside, lifter.lift(a["src"], inner), lifter.lift(a["self"], index))


def _index_put(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    """`x[mask] = number`: one boolean mask over neighbouring dimensions, one number for every place."""
    picks = [(place, p) for place, p in enumerate(a["indices"]) if p is not None]
    if len(picks) != 1 or a["accumulate"] or value(a["values"]).dim():
        return None
    place, mask = picks[0]
    if value(mask).dtype != torch.bool:
        return None
    at = index[place : place + value(mask).dim()]
    return _either(lifter.lift(mask, at), lifter.lift(a["values"], ()), lifter.lift(a["self"], index))


def _free(lifter: Any, index: Index, dim: int) -> bool:
    """Whether the index of this dimension is a coordinate of its own, so that it stands for every place from 0 on."""
    others = [i for place, i in enumerate(index) if place != dim]
    return index[dim] in lifter.sizes.sizes and not any(i.has(index[dim]) for i in others)


def _diff(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    """Differences of neighbouring integers, where one rule holds for the first too: of positions 0, 1, 2 they are 1.

    Before the first element stands `prepend`; the rule's own value at -1 has to be that.
    """
    dim, first = a["dim"] % len(index), a["prepend"]
    at, dtype = index[dim], value(node).dtype
    if first is None or a["append"] is not None or a["n"] != 1 or dtype not in (torch.int64, torch.int32):
        return None
    if not _free(lifter, index, dim) or shape(first)[dim] != 1:
        return None
    here, before, start = (
        lifter.lift(x, (*index[:dim], i, *index[dim + 1 :]))
        for x, i in ((a["self"], at), (a["self"], at - 1), (first, sp.S.Zero))
    )
    if before.has(ex.Load) or sp.expand(before.xreplace({at: sp.S.Zero}) - start) != 0:
        return None
    return sp.expand(here - before)


def _cumsum(lifter: Any, node: fx.Node, a: dict[str, Any], index: Index) -> sp.Basic | None:
    """A running sum of nothing but zeros: what holds at a coordinate holds at all places before it."""
    if not _free(lifter, index, a["dim"] % len(index)):
        return None
    return sp.S.Zero if lifter.lift(a["self"], index) in (sp.false, sp.S.Zero) else None


def _either(c: sp.Basic, x: sp.Basic, y: sp.Basic) -> sp.Basic:
    if ex.is_boolean(x) and ex.is_boolean(y):
        return sp.Or(sp.And(c, x), sp.And(sp.Not(c), y))
    return ex.Where(c, ex.as_number(x), ex.as_number(y))


GATHERS: dict[str, Any] = {
    "aten::embedding": _embedding,
    "aten::index": _index,
    "aten::index_select": _index_select,
    "aten::tril": _triangle(True),
    "aten::triu": _triangle(False),
    "aten::outer": _outer,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
    "aten::slice_scatter": _scatter,
    "aten::select_scatter": _scatter,
    "aten::index_put": _index_put,
}

# Operators that are read only where their elements follow one rule.
REGULAR: dict[str, Any] = {"aten::diff": _diff, "aten::cumsum": _cumsum}
