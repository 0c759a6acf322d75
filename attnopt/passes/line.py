"""Lines: the values of a table by distance, computed by the source's own operators on one row of places.

A relative bias such as T5's gathers a table at `bucket(k - q)`. Running the bucket's own nodes on the
`n_q + n_k - 1` distances gives bit-identical buckets, and the n_q x n_k bias is never made.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.gathers import trailing
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.views import CASTS
from attnopt.region import Line, Region

aten = torch.ops.aten
_distance = sp.Symbol("distance", integer=True)


def draw(graph: fx.Graph, line: Line, region: Region) -> fx.Node:
    """Nodes that make `[heads, n_q + n_k - 1]`: the table's rows at every distance `k - q`, ascending."""
    with graph.inserting_before(region.output):
        n_q, n_k = _extent(graph, region.query, "q"), _extent(graph, region.key, "k")
        first = 1 - n_q if isinstance(n_q, int) else graph.call_function(operator.sub, (1, n_q))
        device = value(line.table).device
        distances = graph.call_function(aten.arange.start, (first, n_k), {"dtype": torch.int64, "device": device})
        index = tuple(i.xreplace({ex.q: sp.S.Zero, ex.k: _distance}) for i in line.index)
        places = _Emitter(graph, distances).emit(line.places, index)
        rows = graph.call_function(aten.embedding.default, (line.table, places))
        return graph.call_function(
            aten.clone.default,
            (graph.call_function(aten.t.default, (rows,)),),
            {"memory_format": torch.contiguous_format},
        )


def _extent(graph: fx.Graph, operand: Any, name: str) -> Any:
    place = operand.dims.index(name)
    size = value(operand.node).shape[place]
    return size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (operand.node, place))


class _Emitter:
    """Emits, for a value at an index over distances, the source's operators on one-dimensional tensors."""

    def __init__(self, graph: fx.Graph, distances: fx.Node) -> None:
        self.graph = graph
        self.distances = distances
        self.lifter = Lifter(Sizes({}), deep=True)
        self.known: dict[Any, Any] = {}

    def emit(self, node: Any, index: tuple[sp.Expr, ...]) -> Any:
        """The node's value at `index`, as a node; numbers stay numbers."""
        if not isinstance(node, fx.Node):
            return node
        if (node, index) not in self.known:
            self.known[node, index] = self._emit(node, index)
        return self.known[node, index]

    def _emit(self, node: fx.Node, index: tuple[sp.Expr, ...]) -> Any:
        moved = self.lifter.step(node, index)
        if moved is not None:
            return self.emit(*moved)
        name = op_name(node)
        if name == "aten::arange":
            a = arguments(node)
            place = self._integers(index[0])
            scaled = self.graph.call_function(aten.mul.Tensor, (place, a.get("step", 1)))
            moved = self.graph.call_function(aten.add.Tensor, (scaled, a.get("start", 0)))
            return self.graph.call_function(aten.to.dtype, (moved, value(node).dtype))
        if name in (
            "aten::zeros",
            "aten::ones",
            "aten::full",
            "aten::zeros_like",
            "aten::ones_like",
            "aten::full_like",
        ):
            fill = arguments(node).get("fill_value", 0 if "zeros" in name else 1)
            keywords = {"dtype": value(node).dtype, "device": value(node).device}
            return self.graph.call_function(aten.full.default, ([], fill), keywords)
        args = tuple(self._argument(x, index) for x in node.args)
        kwargs = {k: self._argument(x, index) for k, x in node.kwargs.items()}
        if name in CASTS:
            return self.graph.call_function(aten.to.dtype, (args[0], value(node).dtype))
        return self.graph.call_function(node.target, args, kwargs)

    def _argument(self, x: Any, index: tuple[sp.Expr, ...]) -> Any:
        if isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor):
            return self.emit(x, trailing(x, index))
        return x

    def _integers(self, index: sp.Expr) -> Any:
        slope, offset = index.coeff(_distance), index.subs(_distance, 0)
        scaled = self.graph.call_function(aten.mul.Tensor, (self.distances, int(slope)))
        return self.graph.call_function(aten.add.Tensor, (scaled, int(offset)))
