"""The view table: one entry an operator, from the index of the result to the index of its input.

An entry takes the lifter, the call's arguments by name, and the index; it gives `(input node, index)`.
Sizes may be symbolic. An entry that cannot prove its substitution raises `NotImplementedError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt.graph import arguments, value
from attnopt.patterns.index import Sizes, same
from attnopt.patterns.sizes import shape, size

Index = tuple[sp.Expr, ...]


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _reshape(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old = sizes.reshape(index, out, shape(a["self"]))
    if old is None:
        raise NotImplementedError("a reshape whose sizes do not tell how dimensions are grouped")
    return a["self"], old


def _expand(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old = shape(a["self"])
    tail = index[len(index) - len(old) :]
    return a["self"], [sp.S.Zero if o == 1 else i for o, i in zip(old, tail, strict=True)]


def _permute(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old: list[Any] = [None] * len(index)
    for place, dim in enumerate(a["dims"]):
        old[_wrap(dim, len(index))] = index[place]
    return a["self"], old


def _swap(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    rank, old = len(index), list(index)
    x, y = _wrap(a.get("dim0", -2), rank), _wrap(a.get("dim1", -1), rank)
    old[x], old[y] = old[y], old[x]
    return a["self"], old


def _transpose2(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    return _swap({"self": a["self"]}, index, out, sizes) if len(index) > 1 else (a["self"], index)


def _movedim(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    rank = len(index)
    given = ([x] if isinstance(x, int) else x for x in (a["source"], a["destination"]))
    source, target = ([_wrap(d, rank) for d in dims] for dims in given)
    stay = iter(d for d in range(rank) if d not in source)
    # Where each dimension of the result comes from: the moved ones as told, the others in their order.
    comes = [source[target.index(place)] if place in target else next(stay) for place in range(rank)]
    old: list[Any] = [None] * rank
    for place, dim in enumerate(comes):
        old[dim] = index[place]
    return a["self"], old


def _unsqueeze(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    dim = _wrap(a["dim"], len(index))
    return a["self"], [*index[:dim], *index[dim + 1 :]]


def _squeeze(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    rank = len(shape(a["self"]))
    dims = a.get("dim", range(rank))
    dims = {_wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = iter(index)
    return a["self"], [sp.S.Zero if d in dims and o == 1 else next(rest) for d, o in enumerate(shape(a["self"]))]


def _slice(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    dim, old = _wrap(a["dim"], len(index)), list(index)
    start = size(a["start"]) if a.get("start") is not None else sp.S.Zero
    if start.is_negative:
        start = start + shape(a["self"])[dim]
        if not start.is_nonnegative:
            if not start.is_negative:
                raise NotImplementedError("a slice that may begin before the first element")
            start = sp.S.Zero
    old[dim] = old[dim] * size(a.get("step", 1)) + start
    return a["self"], old


def _narrow(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    return _slice({**a, "step": 1}, index, out, sizes)


def _select(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old = shape(a["self"])
    dim, at = _wrap(a["dim"], len(old)), size(a["index"])
    return a["self"], [*index[:dim], at + old[dim] if at.is_negative else at, *index[dim:]]


def _flip(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    dims = {_wrap(d, len(index)) for d in a["dims"]}
    return a["self"], [out[d] - 1 - i if d in dims else i for d, i in enumerate(index)]


def _roll(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old = list(index)
    if not a["dims"]:
        raise NotImplementedError("a roll of the flattened tensor")
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        d = _wrap(dim, len(index))
        old[d] = sizes.mod(sp.expand(old[d] - size(shift)), out[d])
    return a["self"], old


def _repeat(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    old = shape(a["self"])
    tail = index[len(index) - len(old) :]
    return a["self"], [sp.S.Zero if o == 1 else sizes.mod(i, o) for o, i in zip(old, tail, strict=True)]


def _repeat_interleave(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    if not isinstance(a["repeats"], int) or a.get("dim") is None:
        raise NotImplementedError("repeat_interleave by a tensor or over the flattened tensor")
    dim, old = _wrap(a["dim"], len(index)), list(index)
    old[dim] = sizes.div(old[dim], sp.Integer(a["repeats"]))
    return a["self"], old


def _stack(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    """One tensor several times, or a place that is known: anything else is a choice and no view."""
    dim, tensors = _wrap(a["dim"], len(index)), a["tensors"]
    rest = [*index[:dim], *index[dim + 1 :]]
    if all(t is tensors[0] for t in tensors):
        return tensors[0], rest
    if not index[dim].is_Integer:
        raise NotImplementedError("a stack of different tensors")
    return tensors[int(index[dim])], rest


def _same(a: dict[str, Any], index: Index, out: list[sp.Expr], sizes: Sizes) -> Any:
    return a.get("self", a.get("input")), index


VIEWS: dict[str, Callable[[dict[str, Any], Index, list[sp.Expr], Sizes], Any]] = {
    "aten::view": _reshape,
    "aten::reshape": _reshape,
    "aten::_unsafe_view": _reshape,
    "aten::flatten": _reshape,
    "aten::unflatten": _reshape,
    "aten::view_as": _reshape,
    "aten::reshape_as": _reshape,
    "aten::expand": _expand,
    "aten::expand_as": _expand,
    "aten::broadcast_to": _expand,
    "aten::permute": _permute,
    "aten::transpose": _swap,
    "aten::swapaxes": lambda a, *rest: _swap({"self": a["self"], "dim0": a["axis0"], "dim1": a["axis1"]}, *rest),
    "aten::mT": _transpose2,
    "aten::t": _transpose2,
    "aten::adjoint": _transpose2,
    "aten::movedim": _movedim,
    "aten::unsqueeze": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::slice": _slice,
    "aten::narrow": _narrow,
    "aten::select": _select,
    "aten::flip": _flip,
    "aten::roll": _roll,
    "aten::repeat": _repeat,
    "aten::tile": _repeat,
    "aten::repeat_interleave": _repeat_interleave,
    "aten::stack": _stack,
    "aten::contiguous": _same,
    "aten::clone": _same,
    "aten::alias": _same,
    "aten::detach": _same,
    "aten::lift_fresh_copy": _same,
    "aten::lift_fresh": _same,
}

# Casts keep the element; whether its value survives is decided by the dtypes on both sides.
CASTS = {"aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::double", "aten::bool"}


def pieces(node: fx.Node) -> tuple[fx.Node, int, sp.Expr] | None:
    """For an item of a split, chunk or unbind: the whole, the dimension, and the offset on it."""
    source, item = node.args
    if not isinstance(source, fx.Node) or not isinstance(item, int):
        return None
    a = arguments(source)
    name = source.target._schema.name if isinstance(source.target, torch._ops.OpOverload) else ""
    if name not in ("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::tensor_split"):
        return None
    whole = a["self"]
    dim = _wrap(a["dim"], len(shape(whole)))
    if name == "aten::unbind":
        return whole, dim, sp.Integer(item)
    offset = sp.Add(*[size(value(part).shape[dim]) for part in _parts(source, item)])
    return whole, dim, offset


def broadcast(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """For an item of `meshgrid` or `broadcast_tensors`: the tensor that it repeats, and the place in that."""
    source, item = node.args
    if not isinstance(source, fx.Node) or not isinstance(item, int):
        return None
    a = arguments(source)
    name = source.target._schema.name if isinstance(source.target, torch._ops.OpOverload) else ""
    if name == "aten::broadcast_tensors":
        tensor = a["tensors"][item]
        return tensor, tuple(_expand({"self": tensor}, index, [], Sizes({}))[1])
    if name == "aten::meshgrid":
        tensor, turned = a["tensors"][item], a.get("indexing", "ij") == "xy" and item < 2
        place = 1 - item if turned and len(index) > 1 else item
        return tensor, (index[place],) if value(tensor).dim() else ()
    return None


def _parts(source: fx.Node, before: int) -> list[Any]:
    return list(value(source))[:before]


__all__ = ["CASTS", "VIEWS", "Index", "broadcast", "pieces", "same", "shape", "size"]
