"""Dependence: which elements of linear maps one element of a tensor is computed from, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import fx

from attnopt.expr import FloorDiv, Mod
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.gathers import trailing
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import CASTS, Index, shape

LINEAR = {"aten::linear", "aten::addmm"}
_REDUCTIONS = {
    "aten::mean", "aten::sum", "aten::var", "aten::std", "aten::amax", "aten::amin", "aten::logsumexp",
    "aten::linalg_vector_norm", "aten::norm", "aten::softmax", "aten::cumsum",
}  # fmt: skip
NORMS = {"aten::layer_norm", "aten::rms_norm"}


def pointwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the same element of the (broadcast) inputs."""
    name, target = op_name(node), node.target
    if name in POINTWISE or name in ("aten::dropout", "aten::silu", "aten::sigmoid", "aten::gelu"):
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


@dataclass(frozen=True)
class Leaf:
    """A linear map (or the stop) at an index, where all guards `low <= expression < high` hold."""

    node: fx.Node
    index: Index
    guards: tuple[tuple[sp.Expr, int, int], ...]


class Walk:
    """Collects every element of linear maps (or of the stop) that an element depends on."""

    def __init__(self, sizes: Sizes, stop: fx.Node | None) -> None:
        self.sizes = sizes
        self.stop = stop
        self.lifter = Lifter(sizes)
        self.leaves: list[Leaf] = []
        self.fresh: set[sp.Symbol] = set()
        self.seen: set[Any] = set()

    def visit(self, node: fx.Node, index: Index, guards: tuple[Any, ...]) -> None:
        """Walk back from one element; operators that are not known end the walk."""
        if (node, index, guards) in self.seen:
            return
        self.seen.add((node, index, guards))
        name = op_name(node)
        if node is self.stop or (self.stop is None and name in LINEAR):
            self.leaves.append(Leaf(node, tuple(index), guards))
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
        elif name == "aten::stack":
            yield from self._stacked(node, index)
        elif name in NORMS:
            count = len(node.args[1])  # type: ignore[arg-type]
            yield node.args[0], self._all(node.args[0], index, range(len(index) - count, len(index))), ()  # type: ignore[misc]
        elif name in _REDUCTIONS:
            yield from self._reduced(node, index)
        elif pointwise(node):
            for x in node.all_input_nodes:
                if isinstance(value(x), torch.Tensor):
                    yield x, trailing(x, index), ()

    def _parts(self, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        dim = arguments(node)["dim"] % len(index)
        start = 0
        for part in node.args[0]:  # type: ignore[union-attr]
            extent = shape(part)[dim]
            if not extent.is_Integer:
                return
            moved = (*index[:dim], index[dim] - start, *index[dim + 1 :])
            yield part, moved, ((index[dim] - start, 0, int(extent)),)  # type: ignore[misc]
            start += int(extent)

    def _stacked(self, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        dim = arguments(node).get("dim", 0) % len(index)
        inner = (*index[:dim], *index[dim + 1 :])
        for place, part in enumerate(node.args[0]):  # type: ignore[arg-type]
            yield part, inner, ((index[dim] - place, 0, 1),)  # type: ignore[misc]

    def _reduced(self, node: fx.Node, index: Index) -> Iterator[tuple[fx.Node, Index, tuple[Any, ...]]]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = len(shape(source))
        dims = arguments(node).get("dim")
        dims = list(range(rank)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
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


def evaluate(
    leaf: Leaf, at: sp.Expr, sizes: Sizes, free: set[sp.Symbol], by: sp.Symbol | None
) -> Iterator[tuple[int, set[int]]]:
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
