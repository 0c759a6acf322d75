"""Routers as operators of the graph: from tokens or queries to the gate of every head and token."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnopt.graph import value
from attnopt.mix.tokens import Tokens
from attnopt.passes.stage import Stage

aten = torch.ops.aten


class Router:
    """Emits the nodes of one site in front of `before`."""

    def __init__(self, stage: Stage, before: fx.Node, query: fx.Node) -> None:
        self.stage, self.before, self.query = stage, before, query

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in front of the site."""
        return self.stage.emit(self.before, target, *args, **kwargs)

    def norms(self, scale: fx.Node) -> fx.Node:
        """`[B, H, n]`: the norm of each head's query times the head's `scale [H, 1]`."""
        return self.emit(aten.mul.Tensor, self.emit(aten.linalg_vector_norm.default, self.query, 2, [-1]), scale)

    def linear(self, tokens: Tokens, weight: fx.Node, bias: fx.Node) -> fx.Node:
        """`[B, H, n]`: a linear map of each token."""
        scores = self.emit(aten.linear.default, tokens.node, weight, bias)
        if tokens.folded:
            seen = value(self.query).shape[0]
            batch = seen if isinstance(seen, int) else self.emit(aten.sym_size.int, self.query, 0)
            scores = self.emit(aten.unflatten.int, scores, 0, [batch, -1])
        return self.emit(aten.transpose.int, scores, 1, 2)

    def gate(self, scores: fx.Node, shared: fx.Node, active: int, learned: bool) -> fx.Node:
        """`[B, H, n]`: 1 for shared heads and for the `active` best of the others, else 0.

        `learned`: the gradient is that of the softmax over the routed heads, the value is 1 all the same.
        """
        ranked = self.emit(aten.masked_fill.Scalar, scores, self.emit(aten.gt.Scalar, shared, 0), -torch.inf)
        best = self.emit(aten.topk.default, ranked, active, 1)
        places = self.emit(operator.getitem, best, 1)
        base = self.emit(aten.add.Tensor, self.emit(aten.zeros_like.default, scores), shared)
        gate = self.emit(aten.scatter.value, base, 1, places, 1.0)
        if not learned:
            return gate
        chances = self.emit(aten.softmax.int, ranked, 1)
        slope = self.emit(aten.sub.Tensor, chances, self.emit(aten.detach.default, chances))
        return self.emit(aten.mul.Tensor, gate, self.emit(aten.add.Scalar, slope, 1.0))

    def with_means(self, out: fx.Node, gate: fx.Node, mean: fx.Node) -> fx.Node:
        """`out [B, H, n, d_v]`, plus the head's `mean [H, 1, d_v]` where the gate is off."""
        off = self.emit(aten.unsqueeze.default, self.emit(aten.rsub.Scalar, gate, 1.0), -1)
        return self.emit(aten.add.Tensor, out, self.emit(aten.mul.Tensor, off, mean))
