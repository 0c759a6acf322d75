"""Projections: which parameter rows make each head of query, key and value, and which columns take its output."""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp
from torch import fx

from attnopt.errors import Decline
from attnopt.expr import Mod
from attnopt.graph import aten, is_call, op_name
from attnopt.patterns.dependence import LINEAR, NORMS, Walk, evaluate, pointwise
from attnopt.patterns.index import Sizes
from attnopt.patterns.views import CASTS, VIEWS, shape
from attnopt.region import Operand, Region
from attnopt.spec import Softmax


@dataclass(frozen=True)
class Projection:
    """One linear map and the part of it that belongs to each head.

    Attributes:
        node: the call of `aten.linear` or `aten.addmm`.
        weight, bias: placeholders of the parameters; `bias` may be None.
        rows: for each head the output features that make it, ascending; for the output projection the input
            features (columns) that take it.
        transposed: whether the weight is stored as `[in, out]` (`addmm`) rather than `[out, in]`.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: tuple[tuple[int, ...], ...]
    transposed: bool

    @property
    def input(self) -> fx.Node:
        """The node that the linear map is applied to."""
        found = self.node.args[1 if self.transposed else 0]
        assert isinstance(found, fx.Node)
        return found


@dataclass(frozen=True)
class Projections:
    """The four linear maps around an attention. Several may be one fused call."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection


def find(region: Region) -> Projections | Decline:
    """The projections of a region, or why heads cannot be told apart in the parameters."""
    try:
        return _find(region)
    except (NotImplementedError, TypeError) as error:
        # An index that is no closed form, or a size that is known only at run time.
        return Decline(f"the projections' rows cannot be worked out: {error}", region.anchor)


def _find(region: Region) -> Projections | Decline:
    if region.merge or region.query_heads or not isinstance(region.spec.normalizer, Softmax):
        return Decline("the heads are no plain softmax attention each", region.anchor)
    found: dict[str, Projection] = {}
    for role, operand in (("query", region.query), ("key", region.key), ("value", region.value)):
        result = _rows(operand, role)
        if isinstance(result, Decline):
            return result
        found[role] = result
    out = _columns(region)
    if isinstance(out, Decline):
        return out
    return Projections(found["query"], found["key"], found["value"], out)


def _rows(operand: Operand, role: str) -> Projection | Decline:
    node = operand.node
    marks = {d: sp.Symbol(d, integer=True, nonnegative=True) for d in operand.dims if isinstance(d, str)}
    index = tuple(marks[d] if isinstance(d, str) else sp.Integer(d) for d in operand.dims)
    sizes = Sizes({marks[d]: n for d, n in zip(operand.dims, shape(node), strict=True) if isinstance(d, str)})
    walk = Walk(sizes, None)
    walk.visit(node, index, ())
    linears = list(dict.fromkeys(leaf.node for leaf in walk.leaves))
    if len(linears) != 1:
        what = "no linear map" if not linears else f"{len(linears)} linear maps"
        return Decline(f"the {role} heads are made by {what}", node)
    free = {marks[d] for d in marks if d in ("h", "d")} | walk.fresh
    heads = int(shape(node)[operand.dims.index("h")]) if "h" in marks else 1
    rows: list[set[int]] = [set() for _ in range(heads)]
    for leaf in walk.leaves:
        *others, last = leaf.index
        if last.free_symbols - free or any(i.free_symbols & free for i in others):
            return Decline(f"the {role} heads are no fixed rows of their projection", leaf.node)
        for h, row in evaluate(leaf, last, sizes, free, marks.get("h")):
            rows[h].update(row)
    return _separate(linears[0], rows, role)


def _separate(node: fx.Node, rows: list[set[int]], role: str) -> Projection | Decline:
    count = sum(map(len, rows))
    if count != len(set().union(*rows)) or not all(rows):
        return Decline(f"the {role} heads share rows of their projection", node)
    return _projection(node, tuple(tuple(sorted(r)) for r in rows), role)


def _projection(node: fx.Node, rows: tuple[tuple[int, ...], ...], role: str) -> Projection | Decline:
    transposed = op_name(node) == "aten::addmm"
    if transposed:
        bias, _, weight = node.args[:3]
        if node.kwargs:
            return Decline(f"the {role} projection scales its terms", node)
    else:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    for parameter in (weight, bias):
        if parameter is None:
            continue
        if not isinstance(parameter, fx.Node) or parameter.op != "placeholder":
            return Decline(f"the {role} projection's weight is computed, no parameter", node)
        if len(parameter.users) > 1:
            return Decline(f"the {role} projection's parameters are used in another place too", node)
    assert isinstance(weight, fx.Node)
    assert bias is None or isinstance(bias, fx.Node)
    return Projection(node, weight, bias, rows, transposed)


def _columns(region: Region) -> Projection | Decline:
    node = _consumer(region.output)
    if isinstance(node, Decline):
        return node
    source = node.args[1 if op_name(node) == "aten::addmm" else 0]
    assert isinstance(source, fx.Node)
    sizes = shape(source)
    marks = tuple(sp.Symbol(f"c{i}", integer=True, nonnegative=True) for i in range(len(sizes)))
    extents = Sizes(dict(zip(marks, sizes, strict=True)))
    walk = Walk(extents, region.output)
    walk.visit(source, marks, ())
    leaves = [leaf for leaf in walk.leaves if leaf.node is region.output]
    place = next(i for i, names in enumerate(region.out_dims) if "h" in names)
    folded = len(region.out_dims[place]) > 1
    column, heads = marks[-1], region.spec.heads.q
    if not leaves or not sizes[-1].is_Integer:
        return Decline("the output projection does not read the attention by features", node)
    owner: list[set[int]] = [set() for _ in range(int(sizes[-1]))]
    for leaf in leaves:
        at = leaf.index[place]
        if at.free_symbols & walk.fresh or (not folded and at.free_symbols - {column}):
            return Decline("the output projection mixes heads before it is applied", node)
        at = Mod(at.subs({m: 0 for m in marks[:-1]}), sp.Integer(heads)) if folded else at
        for c, found in evaluate(leaf, at, extents, {column}, column):
            owner[c].update(found)
    if any(len(o) != 1 for o in owner):
        return Decline("the output projection's columns belong to no single head", node)
    columns = tuple(tuple(c for c, o in enumerate(owner) if o == {h}) for h in range(heads))
    return _projection(node, columns, "output")


def _consumer(output: fx.Node) -> fx.Node | Decline:
    """The one linear map that the output reaches through views, casts and pointwise operators."""
    node = output
    while True:
        users = [u for u in node.users if not is_call(u, aten.sym_size.int)]
        if len(users) != 1:
            return Decline("the attention's output is used in several places", node)
        (user,) = users
        name = op_name(user)
        if name in LINEAR and user.args[1 if name == "aten::addmm" else 0] is node:
            return user
        if name not in VIEWS and name not in CASTS and not pointwise(user) and name not in NORMS:
            return Decline("the attention's output reaches no linear map", user)
        node = user
