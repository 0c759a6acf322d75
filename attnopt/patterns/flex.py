"""`flex_attention`: the graphs of its score and mask functions, read by the same lifter as everything else.

The operator computes `mask_mod` for every pair, whatever its block tables say, and gives zeros for empty rows.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import is_call, value
from attnopt.patterns.gathers import from_end
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import split
from attnopt.patterns.operands import Place
from attnopt.patterns.sdpa import operand
from attnopt.patterns.site import Parts, build, frame, width
from attnopt.patterns.views import Index, shape
from attnopt.region import Region
from attnopt.spec import EmptyRow

FLEX = torch.ops.higher_order.flex_attention
_NAMES = (
    "query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_buffers", "mask_buffers",
)  # fmt: skip


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention that one call of `flex_attention` is."""
    if not is_call(node, FLEX):
        return None
    a: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}
    output = items.pop(0, None)
    if output is None:
        return None
    if items:
        return Decline("its log-sum-exp or its maximum is used as well", node)
    query, key, values = a["query"], a["key"], a["value"]
    framed = frame(output, value(output).dim() - 2, value(output).dim() - 1, shape(key)[-2], shape(query)[-1], None)
    if isinstance(framed, Decline):
        return framed
    lifter = _Inlined(framed.sizes, constants)
    places = (*framed.index[:-2], ex.q, ex.k)
    score = lifter.call(_graph(node, a["score_mod"]), (ex.number(a["scale"]) * ex.s, *places, *a["score_buffers"]))
    keep = lifter.call(_graph(node, a["block_mask"][-1]), (*places, *a["mask_buffers"]))
    if score is None or keep is None:
        return Decline("the score or the mask function has a form that is not known", node)
    masked = split(ex.Where(ex.truth(keep), ex.as_number(score), ex.NEG_INF), lifter.finite)
    if masked.empty_row is EmptyRow.NAN:
        masked = type(masked)(masked.score, masked.keep, EmptyRow.ZERO)
    batch = framed.index[:-2]
    parts = Parts(
        "flex", node, output, masked,
        Place(query, operand(query, batch, ex.q, ex.d, None), ex.q, ex.d),
        Place(key, operand(key, batch, ex.k, ex.d, framed.heads), ex.k, ex.d),
        Place(values, operand(values, batch, ex.k, width, framed.heads), ex.k, width),
    )  # fmt: skip
    return build(parts, framed, lifter)


def _graph(node: fx.Node, attribute: fx.Node) -> fx.Graph:
    return getattr(node.graph.owning_module, str(attribute.target)).graph  # type: ignore[no-any-return]


class _Inlined(Lifter):
    """A lifter that steps into graphs: their inputs stand for expressions, or for tensors of the graph around."""

    def __init__(self, sizes: Sizes, constants: Mapping[str, torch.Tensor]) -> None:
        super().__init__(sizes, constants)
        self.given: dict[fx.Node, Any] = {}

    def call(self, graph: fx.Graph, inputs: Sequence[Any]) -> sp.Basic | None:
        """What the graph gives for these inputs, a scalar; None where a value inside it would have to be loaded."""
        holes = [n for n in graph.nodes if n.op == "placeholder"]
        self.given.update(zip(holes, inputs, strict=False))
        (result,) = graph.output_node().args
        found = self.lift(result[0] if isinstance(result, (tuple, list)) else result, ())
        loaded = (self.nodes.get(load.args[0].name) for load in found.atoms(ex.Load))
        return None if any(isinstance(n, fx.Node) and n.graph is graph for n in loaded) else found

    def _lift(self, node: fx.Node, index: Index) -> sp.Basic:
        given = self.given.get(node)
        if isinstance(given, fx.Node):
            return self.lift(given, index)
        return given if given is not None else super()._lift(node, index)

    def _compute(self, node: fx.Node, name: str, index: Index) -> sp.Basic | None:
        """A tensor read at scalars is wrapped, so that its gradient is a sum."""
        if is_call(node, torch.ops.higher_order.flat_apply) and str(node.args[2]).endswith("ModIndex"):
            tensor, *picks = node.args[3:]
            sizes = shape(tensor)
            if len(picks) + len(index) != len(sizes):
                return None
            at = [from_end(self.lift(p, ()), n, self.sizes) for p, n in zip(picks, sizes, strict=False)]
            return self.lift(tensor, (*at, *index))  # type: ignore[arg-type]
        return super()._compute(node, name, index)
