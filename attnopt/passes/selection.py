"""How a selection moves through each operator toward its inputs: one rule an operator, one line in `RULES`.

A rule gets the restrictor, the node, the dimension and what is kept of it, and gives the restricted node, or None
where it cannot say; then the selection is made at the node itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from attnopt.graph import arguments, op_name, value
from attnopt.passes.regroup import Keep, Maker, Rule, copied, interleaved, reshaped, source_of


def _moved(place: Callable[[fx.Node, int], int | None]) -> Rule:
    """A view that renames dimensions: `place` gives the input's dimension of an output's."""

    def rule(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
        source = source_of(node)
        inner = place(node, dim)
        return None if inner is None else r.again(node, {source: r.part(source, inner, keep)})

    return rule


def _permuted(node: fx.Node, dim: int) -> int:
    rank = value(node).dim()
    name, a = op_name(node), arguments(node)
    if name == "aten::permute":
        return int(a["dims"][dim] % rank)
    x, y = (a.get("dim0", a.get("axis0", -2)) % rank, a.get("dim1", a.get("axis1", -1)) % rank)
    return y if dim == x else x if dim == y else dim


def _unsqueezed(node: fx.Node, dim: int) -> int | None:
    at = arguments(node)["dim"] % value(node).dim()
    return None if dim == at else dim - (dim > at)


def _squeezed(node: fx.Node, dim: int) -> int | None:
    a, old = arguments(node), value(source_of(node)).shape
    given = a.get("dim", list(range(len(old))))
    gone = {d % len(old) for d in ([given] if isinstance(given, int) else given)}
    left = [d for d in range(len(old)) if not (d in gone and old[d] == 1)]
    return left[dim] if op_name(node) == "aten::squeeze" and "dim" in a else None


def _outside(node: fx.Node, dim: int) -> int | None:
    """A slice, a softmax or a norm that acts on other dimensions than this one."""
    a, rank = arguments(node), value(node).dim()
    if "normalized_shape" in a:
        return dim if dim < rank - len(a["normalized_shape"]) else None
    return dim if dim != a["dim"] % rank else None


def _cut(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    a, source = arguments(node), source_of(node)
    if dim != a["dim"] % value(node).dim():
        return r.again(node, {source: r.part(source, dim, keep)})
    start, step = a.get("start") or 0, a.get("step", 1)
    extent = value(source).shape[dim]
    if not all(isinstance(x, int) for x in (start, step, extent)):
        return None
    start = start + extent if start < 0 else start
    return r.part(source, dim, tuple(start + step * i for i in keep))


def _picked(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    source = source_of(node)
    at = arguments(node)["dim"] % value(source).dim()
    return r.again(node, {source: r.part(source, dim + (dim >= at), keep)})


def _reduced(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    a, source = arguments(node), source_of(node)
    rank, given = value(source).dim(), a.get("dim")
    if given is None:
        return None
    gone = {d % rank for d in ([given] if isinstance(given, int) else given)}
    left = [d for d in range(rank) if a.get("keepdim") or d not in gone]
    return None if left[dim] in gone else r.again(node, {source: r.part(source, left[dim], keep)})


def _expanded(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    source = source_of(node)
    sizes = list(arguments(node)["size"])
    place = dim - (value(node).dim() - value(source).dim())
    changed = {}
    if place >= 0 and value(source).shape[place] != 1:
        changed[source] = r.part(source, place, keep)
    sizes[dim] = len(keep)
    return r.again(node, changed, size=sizes)


def _joined(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    parts = list(arguments(node)["tensors"])
    if dim == arguments(node).get("dim", 0) % value(node).dim():
        return None
    return r.again(node, {p: r.part(p, dim, keep) for p in parts})


def _stacked(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    parts, at = list(arguments(node)["tensors"]), arguments(node).get("dim", 0) % value(node).dim()
    return None if dim == at else r.again(node, {p: r.part(p, dim - (dim > at), keep) for p in parts})


def _matmul(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    args = list(node.args)
    *_, left, right = args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank, changed = value(node).dim(), {}
    if min(value(left).dim(), value(right).dim()) < 2 or left is right:
        return None
    sides = [left] if dim == rank - 2 else [right] if dim == rank - 1 else args
    for x in sides:
        assert isinstance(x, fx.Node)
        place = dim - (rank - value(x).dim())
        if place >= 0 and value(x).shape[place] != 1:
            changed[x] = r.part(x, place, keep)
    return r.again(node, changed)


def _einsum(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    a = arguments(node)
    equation = a["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    changed = {}
    for letters, x in zip(inputs.split(","), a["tensors"], strict=True):
        if out[dim] in letters:
            changed[x] = r.part(x, letters.index(out[dim]), keep)
    return r.again(node, changed)


def _linear(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    """A linear map along other dimensions than its features."""
    if dim == value(node).dim() - 1:
        return None
    source = source_of(node)
    return r.again(node, {source: r.part(source, dim, keep)})


def _attention(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    """`scaled_dot_product_attention` over fewer heads."""
    a, rank = arguments(node), value(node).dim()
    query, key, val, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if dim >= rank - 2:
        return None
    changed: dict[fx.Node, fx.Node] = {query: r.part(query, dim, keep)}
    named: dict[str, Any] = {}
    if mask is not None:
        place = dim - (rank - value(mask).dim())
        if place >= 0 and value(mask).shape[place] != 1:
            changed[mask] = r.part(mask, place, keep)
    even = True
    for x in (key, val):
        own, whole = value(x).shape[dim], value(node).shape[dim]
        if own == 1 and whole != 1 and not a["enable_gqa"]:
            continue
        if own == whole:
            changed[x] = r.part(x, dim, keep)
            continue
        table = tuple(i // (whole // own) for i in keep)
        kept = tuple(sorted(set(table)))
        small, table = r.part(x, dim, kept), tuple(kept.index(i) for i in table)
        even = all(table.count(i) == len(table) // len(kept) for i in table)
        changed[x] = small if even else copied(r, node, small, dim, table, len(kept))
    if not even:
        named["enable_gqa"] = False
    return r.again(node, changed, **named)


def _embedding(r: Maker, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
    a = arguments(node)
    if dim == value(node).dim() - 1:
        return r.again(node, {a["weight"]: r.part(a["weight"], 1, keep)})
    return r.again(node, {a["indices"]: r.part(a["indices"], dim, keep)})


def _table(rule: Rule, *names: str) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names}


RULES: dict[str, Rule] = {
    **_table(reshaped, "view", "reshape", "_unsafe_view", "flatten", "unflatten"),
    **_table(_moved(_permuted), "permute", "transpose", "swapaxes", "t", "mT", "adjoint"),
    **_table(_moved(_unsqueezed), "unsqueeze"),
    **_table(_moved(_squeezed), "squeeze"),
    **_table(_moved(lambda node, dim: dim), "contiguous", "clone", "alias", "detach", "lift_fresh_copy"),
    **_table(_moved(_outside), "softmax", "_softmax", "layer_norm", "rms_norm", "cumsum"),
    **_table(_cut, "slice", "narrow"),
    **_table(_picked, "select"),
    **_table(_reduced, "mean", "sum", "amax", "amin", "linalg_vector_norm"),
    **_table(_expanded, "expand"),
    **_table(interleaved, "repeat_interleave"),
    **_table(_joined, "cat"),
    **_table(_stacked, "stack"),
    **_table(_matmul, "matmul", "bmm", "baddbmm"),
    **_table(_einsum, "einsum"),
    **_table(_linear, "linear"),
    **_table(_attention, "scaled_dot_product_attention"),
    **_table(_embedding, "embedding"),
}
