"""Expressions of the query or of the key alone as columns of a tensor, by operators of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.graph import value
from attnopt.passes.stage import Stage
from attnopt.region import Operand, Region

aten = torch.ops.aten

_FUNCTIONS: Mapping[Any, Any] = {
    sp.exp: aten.exp.default, sp.log: aten.log.default, sp.sin: aten.sin.default, sp.cos: aten.cos.default,
    sp.tanh: aten.tanh.default, sp.Abs: aten.abs.default, sp.erf: aten.erf.default, sp.sign: aten.sign.default,
}  # fmt: skip


class Columns:
    """Makes columns beside an operand `[B, heads, n, width]` of a call of the operator.

    Args:
        stage: the graph. region: the site, its operands as the operator takes them.
        operand: its query or its key. place: the coordinate of the operand's rows, `q` or `k`.
    """

    def __init__(self, stage: Stage, region: Region, operand: Operand, place: sp.Symbol) -> None:
        self.stage, self.region, self.node, self.place = stage, region, operand.node, place
        self.before = region.anchor
        seen = value(self.node)
        self.like = {"dtype": seen.dtype, "device": seen.device}

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in front of the site."""
        return self.stage.emit(self.before, target, *args, **kwargs)

    def joined(self, columns: list[fx.Node]) -> fx.Node:
        """The operand with columns appended to its width."""
        return self.emit(aten.cat.default, [self.node, *columns], -1)

    def size(self, dim: int) -> Any:
        """A size of the operand: a number, or the node that knows it."""
        seen = value(self.node).shape[dim]
        return seen if isinstance(seen, int) else self.emit(aten.sym_size.int, self.node, dim)

    def spread(self, factor: fx.Node) -> fx.Node:
        """A tensor `[heads, n, width]` for every entry of the batch, in the operand's dtype."""
        if value(factor).dtype != self.like["dtype"]:
            factor = self.emit(aten.to.dtype, factor, self.like["dtype"])
        return self.emit(aten.expand.default, self.emit(aten.unsqueeze.default, factor, 0), [self.size(0), -1, -1, -1])

    def column(self, expr: sp.Expr) -> fx.Node:
        """`[B, heads, n, 1]`. Raises `NotImplementedError` for what has no operator here."""
        found = self._visit(expr)
        blank = self.emit(aten.zeros_like.default, self.emit(aten.slice.Tensor, self.node, 3, 0, 1))
        return self.emit(aten.add.Tensor, blank, found)

    def _visit(self, expr: sp.Basic) -> Any:
        """A number, or a node that broadcasts to `[B, heads, n, 1]`."""
        if expr.is_number:
            return float(expr)
        if expr in (self.place, ex.h):
            return self._coordinate(expr)
        if isinstance(expr, ex.Load):
            return self._load(expr)
        if isinstance(expr, (sp.Add, sp.Mul)):
            whole, *others = (self._visit(x) for x in sorted(expr.args, key=lambda x: x.is_number))
            target = aten.add if isinstance(expr, sp.Add) else aten.mul
            for other in others:
                whole = self.emit(target.Tensor, whole, other)
            return whole
        if isinstance(expr, sp.Pow) and expr.exp.is_number and not isinstance(expr, sp.exp):
            return self.emit(aten.pow.Tensor_Scalar, self._visit(expr.base), float(expr.exp))
        function = _FUNCTIONS.get(sp.exp if isinstance(expr, sp.exp) else expr.func)
        if function is None:
            raise NotImplementedError(f"{expr} has no operator")
        return self.emit(function, self._visit(ex.sides(expr)[0] if not isinstance(expr, sp.exp) else expr.args[0]))

    def _coordinate(self, symbol: sp.Basic) -> fx.Node:
        numbers = self.emit(aten.arange.default, self.size(1 if symbol == ex.h else 2), **self.like)
        return self._aligned(numbers, [symbol])

    def _load(self, load: ex.Load) -> fx.Node:
        name, *indices = load.args
        node, order = self.region.captures[name.name].node, list(indices)
        if any(i not in (ex.h, self.place) and not i.is_Integer for i in indices) or len(set(order)) != len(order):
            raise NotImplementedError(f"{load} is read at a computed index")
        for dim in reversed(range(len(indices))):
            if indices[dim].is_Integer:
                node = self.emit(aten.select.int, node, dim, int(indices[dim]))
                del order[dim]
            else:
                node = self.emit(aten.slice.Tensor, node, dim, 0, self.size(1 if indices[dim] == ex.h else 2))
        if order == [self.place, ex.h]:
            node, order = self.emit(aten.permute.default, node, [1, 0]), [ex.h, self.place]
        if value(node).dtype != self.like["dtype"]:
            node = self.emit(aten.to.dtype, node, self.like["dtype"])
        return self._aligned(node, order)

    def _aligned(self, node: fx.Node, order: list[Any]) -> fx.Node:
        """Coordinates of a row, or of a head, where `[heads, n, 1]` has them."""
        for _ in range(2 if order == [ex.h] else 1 if order else 0):
            node = self.emit(aten.unsqueeze.default, node, -1)
        return node
