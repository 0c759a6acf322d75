"""What makes it unsafe, or no gain, to fuse a site although its mathematics was read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import op_name, value
from attnopt.nested import AUTOCAST

# Functions that jump: where a score is a rounding away from the edge, two exact orders of summation fall apart.
_JUMPS = (ex.Trunc, ex.FloorDiv, ex.Mod, sp.sign, sp.floor, sp.ceiling)
_ROLES = {"value": "the value", "query": "the query", "key": "the key"}
_AS = {"aten::expand_as", "aten::view_as", "aten::reshape_as", "aten::type_as"}


def unsafe(operands: Mapping[str, Any], captured: Iterable[Any], made: fx.Node, output: fx.Node) -> Decline | None:
    """Why the site is to be left alone, or None.

    Args:
        operands: role to the node of query, key and value.
        captured: the nodes that the score, the mask and the gate load.
        made: the contraction that makes the scores.
        output: what the attention gives.
    """
    for role, node in operands.items():
        dtype, layout = value(node).dtype, value(node).layout
        if not dtype.is_floating_point:
            return Decline(f"{_ROLES[role]} is of {dtype}, and attention is fused for floating point numbers", node)
        if layout is not torch.strided:
            return Decline(f"{_ROLES[role]} is of layout {layout}, and attention is fused for dense tensors", node)
    mixed = _mixed(made, output)
    if mixed:
        return Decline(mixed, made)
    for role, node in (*operands.items(), *((f"%{n}", n) for n in captured)):
        if isinstance(node, fx.Node) and depends(node, made):
            what = _ROLES.get(role, "what is read beside query, key and value")
            return Decline(f"{what} is computed from the scores, so all of them would still have to be made", node)
    return None


def _mixed(made: fx.Node, output: fx.Node) -> str:
    """Whether `torch.autocast` gives the two ends of the attention different precisions; empty if not."""
    device = value(output).device.type
    dtypes = [node.meta.get(AUTOCAST, {}).get(device) for node in (made, output)]
    if dtypes[0] != dtypes[1]:
        return "a part of the attention runs under torch.autocast and a part does not"
    if dtypes[0] is not None and value(output).dtype not in (dtypes[0], torch.float64):
        return f"under torch.autocast the attention gives {value(output).dtype}, not {dtypes[0]}"
    return ""


def jumps(e: sp.Basic) -> bool:
    """Whether a rounding of `s` can change the value by more: comparisons of scores, casts to integers."""
    tested = (where.args[0] for where in e.atoms(ex.Where))
    return any(test.has(ex.s) for test in tested) or any(found.has(ex.s) for found in e.atoms(*_JUMPS))


def depends(node: fx.Node, made: fx.Node) -> bool:
    """Whether a value is computed from `made`. Looks at what stands between the two in the graph, no further."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if current is made:
            return True
        for source in _read(current):
            if source not in seen and (source is made or made < source):
                seen.add(source)
                queue.append(source)
    return False


def _read(node: fx.Node) -> list[fx.Node]:
    """The tensors whose elements a node reads: `zeros_like(x)` and `y.expand_as(x)` take from `x` a shape, no more."""
    name = op_name(node)
    if name.endswith("_like") or name.startswith("aten::new_"):
        return []
    inputs = node.all_input_nodes
    if (name in _AS or node.target is torch.ops.aten.to.other) and isinstance(node.args[0], fx.Node):
        inputs = [node.args[0]]
    return [source for source in inputs if not isinstance(value(source), (int, torch.SymInt))]


def cuts_gradient(node: fx.Node) -> bool:
    """Whether the node is a `detach` that a gradient would otherwise pass: of a value made of floating point inputs."""
    if op_name(node) != "aten::detach":
        return False
    queue, seen = [node], {node}
    while queue:
        current = queue.pop()
        if not current.all_input_nodes and current.op in ("placeholder", "get_attr"):
            return True
        for source in current.all_input_nodes:
            seen_before, found = source in seen, value(source)
            carries = not isinstance(found, torch.Tensor) or found.is_floating_point() or found.is_complex()
            if carries and not seen_before and not isinstance(found, (int, torch.SymInt)):
                seen.add(source)
                queue.append(source)
    return False
