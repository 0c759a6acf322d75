"""Lowering: a region becomes one call of `attnopt::attention` in the graph."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.functional import WRITES
from attnopt.graph import value
from attnopt.passes import recompute
from attnopt.passes.line import draw
from attnopt.region import Line, Operand, Region

aten = torch.ops.aten


class Lowering:
    """Lowers regions of one graph; shared captures and run-time sizes are prepared once. Call `finish` at the end.

    `again`: weights with other users are made again by an operator of their own.
    """

    def __init__(self, gm: fx.GraphModule, again: bool = False) -> None:
        self.gm = gm
        self.again = again
        self.graph = gm.graph
        self.prepared: dict[Any, fx.Node] = {}
        self.scalars: dict[sp.Symbol, fx.Node] = {}
        self.outputs: list[fx.Node] = []
        self.replaced: dict[Any, fx.Node] = {}
        self.first = next(n for n in gm.graph.nodes if n.op != "placeholder")

    def finish(self) -> None:
        """What concerns all lowered outputs at once: operators after them may rely on the strides they had."""
        _keep_strides(self.graph, self.outputs)

    def lower(self, region: Region) -> fx.Node | Decline:
        """Replace the region's output by the operator. Returns the operator's node."""
        if region.output.meta.get(WRITES):
            return Decline("the output is written in place in a way that cannot be made pure", region.output)
        scalars = [[self._scalar(term, symbol) for symbol in term.scalars.values()] for term in region.terms]
        for scalar in (x for found in scalars for x in found):
            if isinstance(scalar, Decline):
                return scalar
        captures = [[self._capture(term, name, o) for name, o in term.captures.items()] for term in region.terms]
        calls = []
        dtype = _widest(region)
        returned = recompute.wanted(region, dtype) if self.again else []
        with self.graph.inserting_before(region.output):
            for term, loaded, numbers in zip(region.terms, captures, scalars, strict=True):
                given = (term.query, term.key, term.value)
                query, key, val = (self._wide(self._heads(term, o), o, dtype) for o in given)
                seed = [self._seed()] if term.spec.dropout else []
                text = recompute.text_of(term) if returned else term.spec.text
                operands = (query, key, val, [*loaded, *seed], numbers, text)
                calls.append(self._call(torch.ops.attnopt.attention.default, *operands))
            parts = [self._call(operator.getitem, call, 0) for call in calls]
            total = functools.reduce(lambda x, y: self._call(aten.add.Tensor, x, y), parts)
            out = self._arrange(region, total, dtype)
            if returned:
                recompute.give(region, returned, calls[0], self._call(operator.getitem, calls[0], 1), self._call)
        for call in calls:
            call.meta.update({k: v for k, v in region.anchor.meta.items() if k in ("stack_trace", "nn_module_stack")})
            call.meta["attnopt_anchor"] = region.anchor.name
        call = calls[0]
        call.meta["attnopt_call"] = region.anchor.name
        out.meta = {**region.output.meta, "attnopt_site": region.anchor.name}
        region.output.replace_all_uses_with(out)
        self.replaced[region.output] = out
        self.outputs.append(out)
        return call

    def _seed(self) -> fx.Node:
        """A number drawn at every call; forward and backward pass make the dropout mask from it."""
        keywords = {"dtype": torch.int64, "device": torch.device("cpu")}
        return self.graph.call_function(aten.randint.low, (0, 2**62, []), keywords)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _heads(self, region: Region, operand: Operand) -> fx.Node:
        """The operand as [batch, heads, positions, width], by views wherever possible."""
        position = "q" if operand is region.query else "k"
        order = [*(region.batch or ("b",)), "h", position, "d"]
        node, dims = self._select(self.replaced.get(operand.node, operand.node), list(operand.dims))
        if ("b", "h") in dims:
            place = dims.index(("b", "h"))
            node = self._call(aten.unflatten.int, node, place, [-1, region.spec.heads.q])
            dims[place : place + 1] = ["b", "h"]
        if operand is region.query and region.query_heads:
            node = self._chosen(node, dims.index("h"), region.query_heads)
        present = [d for d in order if d in dims]
        if dims != present:
            node = self._call(aten.permute.default, node, [dims.index(d) for d in present])
        for place, name in enumerate(order):
            if name not in present:
                node = self._call(aten.unsqueeze.default, node, place)
        heads = region.spec.heads.q if operand is region.query and "h" not in present else -1
        if heads > 1 or any(b not in present for b in region.batch):
            sizes = [self._extent(region, b) for b in region.batch or ()] or [-1]
            node = self._call(aten.expand.default, node, [*sizes, heads, -1, -1])
        if len(region.batch) > 1:
            node = self._call(aten.flatten.using_ints, node, 0, len(region.batch) - 1)
        return node

    def _chosen(self, node: fx.Node, place: int, heads: tuple[int, ...]) -> fx.Node:
        """Some heads of a tensor: a view where they are evenly spaced, else a copy."""
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        if step > 0 and heads == tuple(range(heads[0], heads[-1] + 1, step)):
            return self._call(aten.slice.Tensor, node, place, heads[0], heads[-1] + 1, step)
        parts = [self._call(aten.select.int, node, place, head) for head in heads]
        return self._call(aten.stack.default, parts, place)

    def _wide(self, node: fx.Node, operand: Operand, dtype: torch.dtype) -> fx.Node:
        return node if value(operand.node).dtype == dtype else self._call(aten.to.dtype, node, dtype)

    def _select(self, node: fx.Node, dims: list[Any]) -> tuple[fx.Node, list[Any]]:
        for place in reversed(range(len(dims))):
            if isinstance(dims[place], int):
                node = self._call(aten.select.int, node, place, dims[place])
                dims = dims[:place] + dims[place + 1 :]
        return node, dims

    def _extent(self, region: Region, name: str) -> Any:
        for operand in (region.query, region.key, region.value):
            if name in operand.dims:
                place = operand.dims.index(name)
                seen = value(operand.node).shape[place]
                return seen if isinstance(seen, int) else self._call(aten.sym_size.int, operand.node, place)
        place, names = next((i, d) for i, d in enumerate(region.out_dims) if name in d)
        known = {"h": region.spec.heads.q, "d": region.spec.heads.d_v}
        return int(value(region.output).shape[place]) // math.prod(known[n] for n in names if n != name)

    def _capture(self, region: Region, name: str, operand: Operand) -> fx.Node:
        """The captured tensor with fixed dimensions gone, ordered, and its key dimension contiguous."""
        order = sorted((d for d in operand.dims if isinstance(d, str)), key=lambda d: int(d[1:]))
        key = (operand.node, operand.dims)
        if key in self.prepared:
            return self.prepared[key]
        if isinstance(operand.node, Line):
            key = (operand.node.places, operand.node.index, operand.node.table)
            if key not in self.prepared:
                self.prepared[key] = draw(self.graph, operand.node, region)
            return self.prepared[key]
        with self.graph.inserting_before(self._after(operand.node)):
            node, dims = self._select(operand.node, list(operand.dims))
            if dims != order:
                node = self._call(aten.permute.default, node, [dims.index(d) for d in order])
            if self._scattered_keys(region, name, operand, order):
                node = self._call(aten.clone.default, node)
                node.kwargs = {"memory_format": torch.contiguous_format}
        self.prepared[key] = node
        return node

    def _scattered_keys(self, region: Region, name: str, operand: Operand, order: list[str]) -> bool:
        """Whether neighbouring keys lie apart in memory, so that a kernel would have to gather."""
        strides = value(operand.node).stride()
        for load in ex.loads(region.spec.score, region.spec.keep):
            if load.args[0].name == name:
                for place, index in enumerate(load.args[1:]):
                    stride = strides[operand.dims.index(order[place])]
                    if index.has(ex.k) and isinstance(stride, int) and stride > 1:
                        return True
        return False

    def _scalar(self, region: Region, symbol: Any) -> fx.Node | int | Decline:
        """What yields the symbolic size at run time; a node or a number stays what it is."""
        if not isinstance(symbol, sp.Symbol):
            return symbol
        if symbol not in self.scalars:
            found = self._size(symbol, region.output)
            if found is None:
                return Decline(f"no value in the graph before the attention is the size {symbol}", region.anchor)
            self.scalars[symbol] = found
        return self.scalars[symbol]

    def _size(self, symbol: sp.Symbol, output: fx.Node) -> fx.Node | None:
        """The first value that is the size or has a dimension of it: an input, or what read it from data."""
        for node in self.graph.nodes:
            if node is output:
                return None
            seen = value(node)
            if isinstance(seen, torch.SymInt) and seen.node.expr == symbol:
                return node
            for dim, size in enumerate(seen.shape if isinstance(seen, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    with self.graph.inserting_before(self._after(node)):
                        return self._call(aten.sym_size.int, node, dim)
        return None

    def _after(self, node: fx.Node) -> fx.Node:
        """The first place after the node where code may stand."""
        return self.first if node.op == "placeholder" else node.next

    def _arrange(self, region: Region, out: fx.Node, dtype: torch.dtype) -> fx.Node:
        """[batch, heads, queries, width] in the source's order of dimensions."""
        present = [name for names in region.out_dims for name in names]
        order = [*(region.batch or ("b",)), "h", "q", "d"]
        if len(region.batch) > 1:
            sizes = [self._extent(region, b) for b in region.batch]
            out = self._call(aten.unflatten.int, out, 0, sizes)
        for place in reversed(range(len(order))):
            if order[place] not in present:
                out = self._call(aten.select.int, out, place, 0)
                order.pop(place)
        if order != present:
            out = self._call(aten.permute.default, out, [order.index(n) for n in present])
        for place, names in enumerate(region.out_dims):
            if len(names) > 1:
                out = self._call(aten.flatten.using_ints, out, place, place + len(names) - 1)
        if value(region.output).dtype != dtype:
            out = self._call(aten.to.dtype, out, value(region.output).dtype)
        return out


def _widest(region: Region) -> torch.dtype:
    """Operands of different types are computed in the widest, as the source's scores or weights were."""
    operands = (o for term in region.terms for o in (term.query, term.key, term.value))
    return functools.reduce(torch.promote_types, (value(o.node).dtype for o in operands))


# Operators that read memory rather than elements: they see the strides that the source had.
_BY_STRIDE = (
    aten.as_strided.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten.view_as_real.default,
)


def _keep_strides(graph: fx.Graph, outputs: Sequence[fx.Node]) -> None:
    """The new outputs lie otherwise in memory than the source's, whose strides later operators may rely on.

    `view` becomes `reshape`, which does not; before an operator that reads memory the output is made contiguous.
    """
    readers = []
    for node in _reached(outputs, lambda n: n.users):
        if node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default
        if node.op == "call_function" and node.target in _BY_STRIDE:
            readers.append(node)
    read = _reached(readers, lambda n: n.all_input_nodes)
    for out in (n for n in outputs if n in read):
        users = list(out.users)
        with graph.inserting_after(out):
            copy = graph.call_function(aten.clone.default, (out,), {"memory_format": torch.contiguous_format})
        copy.meta = dict(out.meta)
        for user in users:
            user.replace_input_with(out, copy)


def _reached(start: Sequence[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes and everything that they lead to."""
    queue, seen = list(start), set(start)
    while queue:
        for node in following(queue.pop()):
            if node not in seen:
                seen.add(node)
                queue.append(node)
    return seen
