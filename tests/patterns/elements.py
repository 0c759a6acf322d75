"""Numbers from lifted expressions: every element of a node, computed from the tensors that it loads."""

from __future__ import annotations

import itertools
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter

PLACES = tuple(sp.Symbol(f"i{n}", integer=True, nonnegative=True) for n in range(6))


def number(expr: sp.Basic, tensors: dict[str, torch.Tensor], place: dict[sp.Symbol, int]) -> Any:
    """The value of an expression at a place, loads read from tensors."""
    if expr in place:
        return place[expr]
    if isinstance(expr, ex.Load):
        found = tensors[expr.args[0].name][tuple(int(number(i, tensors, place)) for i in expr.args[1:])].item()
        return ex.number(found)
    if not expr.args:
        return expr
    if isinstance(expr, ex.Where):
        return number(expr.args[1 if number(expr.args[0], tensors, place) else 2], tensors, place)
    args = [number(a, tensors, place) for a in expr.args]
    return sp.Integer(int(args[0])) if isinstance(expr, ex.Trunc) else expr.func(*args)


def lifted(graph: fx.Graph, node: fx.Node, values: dict[str, torch.Tensor], deep: bool = True) -> torch.Tensor:
    """The tensor that the lifted expression of `node` describes, in fp64."""
    seen = node.meta["val"]
    index = PLACES[: seen.dim()]
    lifter = Lifter(Sizes(dict(zip(index, map(sp.Integer, seen.shape), strict=True))), deep=deep)
    expr = lifter.lift(node, index)
    out = torch.empty(seen.shape, dtype=torch.float64)
    for place in itertools.product(*map(range, seen.shape)):
        out[place] = float(ex.as_number(sp.sympify(number(expr, values, dict(zip(index, place, strict=True))))))
    return out


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, remembered by name."""
        result = super().run_node(n)
        self.seen = {**getattr(self, "seen", {}), n.name: result}
        return result
