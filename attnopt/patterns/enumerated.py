"""Expressions of elements over a grid: layouts are followed by enumeration, what is computed between them is lifted.

A value is a list of cases, each a part of the grid with an expression. The expression's loads are marks: the node and
the places at which it is read there, which `closed` then writes in the coordinates of the site, proven at every place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.graph import op_name, value
from attnopt.patterns.contraction import extent, is_contraction, operands
from attnopt.patterns.grids import Array, Unproven, evaluated, plain
from attnopt.patterns.lift import Lifter
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.traces import RULES, Piece, Tracer, both
from attnopt.patterns.views import CASTS, VIEWS, shape

_COMPUTED = {*POINTWISE, *CASTS, "aten::dropout", "aten::native_dropout"}
_MOST_CASES = 64


@dataclass(frozen=True)
class Case:
    """Where `holds`, the value is `expr` over the marks, each a piece of a node."""

    holds: Array
    expr: sp.Expr
    marks: tuple[tuple[fx.Node, Piece], ...] = ()


class Enumeration:
    """Values around one softmax. `lifter` reads what is computed; nodes of `ends` are marks."""

    def __init__(self, lifter: Lifter, ends: Iterable[fx.Node]) -> None:
        self.lifter, self.tracer = lifter, Tracer(tuple(ends))
        self.lifter.stops.update(ends)

    def cases(self, node: Any, index: tuple[Any, ...], holds: Array) -> list[Case]:
        """The value of `node` at `index` where `holds`. Raises `Unproven`."""
        found = []
        for piece in self.tracer.pieces(node, index, holds):
            if piece.number is not None:
                found.append(Case(piece.holds, ex.number(piece.number)))
            elif piece.node in self.tracer.ends:
                found.append(_mark(piece))
            elif is_contraction(piece.node) and extent(piece.node) == 1:
                found += self._product(piece)
            elif op_name(piece.node) in _COMPUTED:
                found += self._computed(piece)
            else:
                found.append(_mark(piece))
        found = [case for case in found if case.holds.any()]
        if len(found) > _MOST_CASES:
            raise Unproven(f"the value of {node} has more than {_MOST_CASES} cases")
        return found

    def _product(self, piece: Piece) -> list[Case]:
        """A sum of one product."""
        found = [Case(piece.holds, sp.S.One)]
        for side in operands(piece.node, piece.index, sp.S.Zero):  # type: ignore[arg-type]
            found = [_joined(x, y, x.expr * y.expr) for x in found for y in self.cases(*side, x.holds)]
        return found

    def _computed(self, piece: Piece) -> list[Case]:
        """A pointwise operator, read by the lifter at an index of its own, over values of other layouts."""
        seen, node = value(piece.node), piece.node
        fresh = [sp.Symbol(f"_{node.name}_{i}", integer=True, nonnegative=True) for i in range(seen.dim())]
        self.lifter.sizes.sizes.update(zip(fresh, shape(node), strict=True))
        self.lifter.stops.update(self._layouts(node))
        expr = ex.as_number(self.lifter.lift(node, tuple(fresh)))
        at, found = dict(zip(fresh, piece.index, strict=True)), [Case(piece.holds, expr)]
        for load in sorted(expr.atoms(ex.Load), key=str):
            source = self.lifter.nodes[load.args[0].name]
            if source is node:
                return [_mark(piece)]
            index = tuple(evaluated(i, at) for i in load.args[1:])
            cases = [(x, y) for x in found for y in self.cases(source, index, x.holds)]
            found = [_joined(x, y, x.expr.xreplace({load: y.expr})) for x, y in cases]
        if any(case.expr.free_symbols & set(fresh) for case in found):
            raise Unproven(f"the value of {node} depends on the place in a chunk in a way that is no layout")
        return found

    def _layouts(self, node: fx.Node) -> set[fx.Node]:
        """The nearest nodes behind pointwise operators whose elements are to be followed by enumeration."""
        found, queue, seen = set(), list(node.all_input_nodes), {node}
        while queue:
            current = queue.pop()
            if current in seen or not isinstance(value(current), torch.Tensor):
                continue
            seen.add(current)
            if self._laid_out(current):
                found.add(current)
            elif op_name(current) in _COMPUTED and current not in self.tracer.ends:
                queue += current.all_input_nodes
        return found

    def _laid_out(self, node: fx.Node) -> bool:
        """Whether views end at an operator that joins parts, or that chooses by a mask that the graph makes."""
        while op_name(node) in VIEWS and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if op_name(node) in ("aten::where", "aten::masked_fill"):
            mask = node.args[1 if op_name(node) == "aten::masked_fill" else 0]
            return isinstance(mask, fx.Node) and self.tracer.constants.tensor(mask) is not None
        return op_name(node) in RULES or is_contraction(node)


def mark(node: fx.Node) -> ex.Load:
    """What stands for the element of a node in the expressions of cases."""
    return ex.load(f"at_{node.name}", integer=not value(node).is_floating_point())


def _mark(piece: Piece) -> Case:
    """The element of a node as it stands."""
    return Case(piece.holds, mark(piece.node), ((piece.node, piece),))


def _joined(x: Case, y: Case, expr: sp.Expr) -> Case:
    """A value over those of two cases, where both hold."""
    marks = dict(x.marks)
    for node, piece in y.marks:
        pairs = zip(marks.get(node, piece).index, piece.index, strict=True)
        if not all(np.array_equal(plain(i), plain(j)) for i, j in pairs):
            raise Unproven(f"{node} is read at two places for one value")
        marks.setdefault(node, piece)
    return Case(both(x.holds, y.holds), expr, tuple(marks.items()))
