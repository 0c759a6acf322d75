"""Restricting a graph to part of a dimension, pushed back through operators to the linear maps that make it.

`take(node, dim, keep)` gives a node equal to `index_select(node, dim, keep)` that computes no more than it must:
the selection moves through views, pointwise operators, reductions and contractions. Where an operator is not
known the selection is made there, which is always correct and only saves less.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.graph import aten, op_name, value
from attnopt.passes.regroup import Keep, copied
from attnopt.passes.selection import RULES
from attnopt.patterns.dependence import pointwise
from attnopt.patterns.views import CASTS, pieces

_COPIED = ("stack_trace", "nn_module_stack", "from_node", "attnopt_rewrites")


class Restrictor:
    """Builds restricted copies of nodes of one graph.

    Attributes:
        linears: linear maps whose rows may be removed; `wanted[node]` lists the selections made of each.
        through: nodes that are rebuilt even where all of them is wanted, since the linear map under them shrinks.
        created: every node made, in order of creation.
        copies: for an original node, the node that computes part of it.
    """

    def __init__(self, gm: fx.GraphModule, linears: Sequence[fx.Node], through: Collection[fx.Node] = ()) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.linears = set(linears)
        self.through = set(through)
        self.wanted: dict[fx.Node, list[tuple[Keep, fx.Node]]] = {n: [] for n in linears}
        self.created: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self._known: dict[tuple[fx.Node, int, Keep], fx.Node] = {}
        self._before: fx.Node | None = None

    def take(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        """The node `index_select(node, dim, keep)`."""
        dim %= value(node).dim()
        extent = value(node).shape[dim]
        if isinstance(extent, int) and keep == tuple(range(extent)) and node not in self.through:
            return node
        key = (node, dim, keep)
        if key not in self._known:
            self._known[key] = self._take(node, dim, keep)
        return self._known[key]

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call after `like`, with its source line and its fake value."""
        after = self._before or _after(like)
        with self.graph.inserting_before(after):
            new = self.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in like.meta.items() if k in _COPIED}
        new.meta["val"] = target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))
        self.created.append(new)
        return new

    def select(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        """The selection made right here: a narrow where it is one, else an `index_select`."""
        if keep == tuple(range(keep[0], keep[0] + len(keep))):
            return self.emit(node, aten.narrow.default, node, dim, keep[0], len(keep))
        outer, self._before = self._before, self._before or _after(node)
        try:
            return self.emit(node, aten.index_select.default, node, dim, self.constant(node, keep))
        finally:
            self._before = outer

    def constant(self, like: fx.Node, table: Keep) -> fx.Node:
        """A tensor of head numbers on the device of `like`; its values stand in `meta`."""
        name = next(n for i in itertools.count() if not hasattr(self.gm, n := f"attnopt_heads_{i}"))
        self.gm.register_buffer(name, torch.tensor(table, device=value(like).device))
        fake = value(like)
        with self.graph.inserting_before(self._before or _after(like)):
            new = self.graph.get_attr(name)
        new.meta["val"] = fake.new_empty((len(table),), dtype=torch.int64)
        new.meta["attnopt_table"] = table
        self.created.append(new)
        return new

    def spread(self, node: fx.Node, dim: int, table: Keep, count: int) -> fx.Node:
        """The `count` heads of a node, head `table[i]` at place i."""
        outer, self._before = self._before, _after(node)
        try:
            return copied(self, node, node, dim, table, count)
        finally:
            self._before = outer

    def undo(self) -> None:
        """Remove every node that was made."""
        for node in reversed(self.created):
            self.graph.erase_node(node)

    def _take(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        outer, self._before = self._before, _after(node)
        try:
            if node in self.linears and dim == value(node).dim() - 1:
                new = self.emit(node, aten.index_select.default, node, dim, self.constant(node, keep))
                self.wanted[node].append((keep, new))
                return new
            new = self._push(node, dim, keep) or self.select(node, dim, keep)
        finally:
            self._before = outer
        self.copies.setdefault(node, new)
        return new

    def part(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        """`take` of an input: its nodes stand after the input, not after what is being built."""
        outer, self._before = self._before, None
        try:
            return self.take(node, dim, keep)
        finally:
            self._before = outer

    def _push(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
        name = op_name(node)
        if node.op == "call_function" and node.target is operator.getitem:
            return self._piece(node, dim, keep)
        rule = RULES.get(name)
        if rule is not None:
            return rule(self, node, dim, keep)
        if name in CASTS or pointwise(node):
            return self._broadcast(node, dim, keep)
        return None

    def again(self, node: fx.Node, changed: dict[fx.Node, fx.Node], **named: Any) -> fx.Node:
        """The node's call with other inputs, and other arguments by name."""
        args: list[Any] = list(fx.map_arg(node.args, lambda n: changed.get(n, n)))
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: changed.get(n, n)))
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        for name, given in named.items():
            place = names.index(name)
            if place < len(args):
                args[place] = given
            else:
                kwargs[name] = given
        return self.emit(node, node.target, *args, **kwargs)

    def _broadcast(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node:
        rank = value(node).dim()
        changed = {}
        for x in node.all_input_nodes:
            seen = value(x)
            if isinstance(seen, torch.Tensor):
                place = dim - (rank - seen.dim())
                if place >= 0 and seen.shape[place] != 1:
                    changed[x] = self.part(x, place, keep)
        return self.again(node, changed)

    def _piece(self, node: fx.Node, dim: int, keep: Keep) -> fx.Node | None:
        found = pieces(node)
        if found is None or not found[2].is_Integer:
            return None
        whole, cut, offset = found[0], found[1], int(found[2])
        if not isinstance(value(whole).shape[cut], int):
            return None
        if value(node).dim() < value(whole).dim():
            part = self.part(whole, dim + (dim >= cut), keep)
            return self.emit(node, aten.select.int, part, cut, offset)
        if dim == cut:
            return self.part(whole, dim, tuple(offset + i for i in keep))
        part = self.part(whole, dim, keep)
        return self.emit(node, aten.narrow.default, part, cut, offset, value(node).shape[cut])


def _after(node: fx.Node) -> fx.Node:
    """The first place after the node where code may stand."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
