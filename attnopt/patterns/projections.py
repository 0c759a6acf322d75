"""Projections: which parameter rows make each head of query, key and value, and which columns take its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import fx

from attnopt.errors import Decline
from attnopt.expr import FloorDiv, Mod
from attnopt.graph import aten, is_call, value
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter, op_name, trailing
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import CASTS, VIEWS, Index, shape
from attnopt.region import Operand, Region

_LINEAR = {"aten::linear", "aten::addmm"}
_REDUCTIONS = {
    "aten::mean", "aten::sum", "aten::var", "aten::std", "aten::amax", "aten::amin", "aten::logsumexp",
    "aten::linalg_vector_norm", "aten::norm", "aten::softmax", "aten::cumsum",
}  # fmt: skip
_NORMS = {"aten::layer_norm", "aten::rms_norm"}


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
    walk = _Walk(sizes, None)
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
        for h, row in _evaluate(leaf, last, sizes, free, marks.get("h")):
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
    assert isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
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
    walk = _Walk(extents, region.output)
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
        for c, found in _evaluate(leaf, at, extents, {column}, column):
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
        if name in _LINEAR and user.args[1 if name == "aten::addmm" else 0] is node:
            return user
        if name not in VIEWS and name not in CASTS and not pointwise(user) and name not in _NORMS:
            return Decline("the attention's output reaches no linear map", user)
        node = user


def pointwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the same element of the (broadcast) inputs."""
    name, target = op_name(node), node.target
    if name in POINTWISE or name in ("aten::dropout", "aten::silu", "aten::sigmoid", "aten::gelu"):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


@dataclass(frozen=True)
class _Leaf:
    """A linear map (or the stop) at an index, where all guards `low <= expression < high` hold."""

    node: fx.Node
    index: Index
    guards: tuple[tuple[sp.Expr, int, int], ...]


class _Walk:
    """Collects every element of linear maps (or of the stop) that an element depends on."""

    def __init__(self, sizes: Sizes, stop: fx.Node | None) -> None:
        self.sizes = sizes
        self.stop = stop
        self.lifter = Lifter(sizes)
        self.leaves: list[_Leaf] = []
        self.fresh: set[sp.Symbol] = set()
        self.seen: set[Any] = set()

    def visit(self, node: fx.Node, index: Index, guards: tuple[Any, ...]) -> None:
        """Walk back from one element; operators that are not known end the walk."""
        if (node, index, guards) in self.seen:
            return
        self.seen.add((node, index, guards))
        name = op_name(node)
        if node is self.stop or (self.stop is None and name in _LINEAR):
            self.leaves.append(_Leaf(node, tuple(index), guards))
            return
        for inner, at, more in self._inputs(node, name, index):
            self.visit(inner, tuple(at), (*guards, *more))

    def _inputs(self, node: fx.Node, name: str, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        moved = self.lifter.step(node, index)
        if moved is not None:
            yield (*moved, ())
        elif name in CASTS:
            yield node.args[0], index, ()  # type: ignore[misc]
        elif name == "aten::cat":
            yield from self._parts(node, index)
        elif name in _NORMS:
            count = len(node.args[1])  # type: ignore[arg-type]
            yield node.args[0], self._all(node.args[0], index, range(len(index) - count, len(index))), ()  # type: ignore[misc]
        elif name in _REDUCTIONS:
            yield from self._reduced(node, index)
        elif pointwise(node):
            for x in node.all_input_nodes:
                if isinstance(value(x), torch.Tensor):
                    yield x, trailing(x, index), ()

    def _parts(self, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(index)  # type: ignore[operator]
        start = 0
        for part in node.args[0]:  # type: ignore[union-attr]
            extent = shape(part)[dim]
            if not extent.is_Integer:
                return
            moved = (*index[:dim], index[dim] - start, *index[dim + 1 :])
            yield part, moved, ((index[dim] - start, 0, int(extent)),)  # type: ignore[misc]
            start += int(extent)

    def _reduced(self, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = len(shape(source))
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        dims = given.get("dim")
        dims = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims)  # type: ignore[call-overload]
        gone = sorted(d % rank for d in dims)
        full = list(index)
        if len(full) != rank:
            for d in gone:
                full.insert(d, sp.S.Zero)
        yield source, self._all(source, tuple(full), gone), ()

    def _all(self, source: Any, index: Index, dims: Any) -> Index:
        """The index with coordinates that run over the whole of the given dimensions."""
        out = list(index)
        for d in dims:
            extent = shape(source)[d]
            mark = sp.Symbol(f"all_{source.name}_{d}", integer=True, nonnegative=True)
            self.fresh.add(mark)
            self.sizes.sizes[mark] = extent
            out[d] = mark
        return tuple(out)


def _evaluate(leaf: _Leaf, at: sp.Expr, sizes: Sizes, free: set[sp.Symbol], by: sp.Symbol | None) -> Iterator[tuple[int, set[int]]]:
    """For each value of `by` the values that `at` takes where the guards hold."""
    used = {s for e in (at, *(g[0] for g in leaf.guards)) for s in e.free_symbols} & free
    order = sorted(used | ({by} if by is not None else set()), key=lambda s: (s != by, s.name))
    extents = [int(sizes.sizes[s]) for s in order]
    grids = dict(zip(order, np.meshgrid(*map(np.arange, extents), indexing="ij"), strict=True))
    whole = tuple(extents)
    values = np.broadcast_to(_number(at, grids), whole)
    kept = np.ones(whole, dtype=bool)
    for test, low, high in leaf.guards:
        # A guard over positions or the batch says nothing about features.
        if not test.free_symbols - set(grids):
            found = _number(test, grids)
            kept = kept & np.broadcast_to((found >= low) & (found < high), whole)
    if by is None:
        yield 0, set(values[kept].ravel().tolist())
        return
    for place in range(extents[0]):
        yield place, set(values[place][kept[place]].ravel().tolist())


def _number(e: sp.Basic, grids: Mapping[sp.Basic, Any]) -> Any:
    """An index expression over arrays of coordinates."""
    if e in grids:
        return grids[e]
    if e.is_Integer:
        return np.asarray(int(e))  # type: ignore[call-overload]
    parts = [_number(a, grids) for a in e.args]
    if isinstance(e, sp.Add):
        return sum(parts)
    if isinstance(e, sp.Mul):
        return np.multiply(*parts) if len(parts) == 2 else np.prod(np.broadcast_arrays(*parts), axis=0)
    if isinstance(e, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(e, Mod):
        return parts[0] % parts[1]
    raise NotImplementedError(f"an index of the form {e}")


__all__ = ["Projection", "Projections", "find", "pointwise"]
