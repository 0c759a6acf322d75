"""Whether a region that a pattern from outside made fits the graph it was read from."""

from __future__ import annotations

from typing import Any

import torch

from attnopt.errors import AttnoptError, Decline
from attnopt.graph import value
from attnopt.patterns.views import shape
from attnopt.region import Operand, Region


def sound(found: Any, name: str, node: Any) -> Region | Decline | None:
    """What the pattern `name` gave for `node`, or a `Decline` that names the pattern and its mistake."""
    if found is None or isinstance(found, Decline):
        return found
    if not isinstance(found, Region):
        return Decline(f"pattern {name!r} gave {type(found).__name__}; it must give a Region, a Decline or None", node)
    try:
        found.spec.verify()
        fault = _fault(found)
    except (AttnoptError, AttributeError, LookupError, TypeError, ValueError) as error:
        fault = str(error) or type(error).__name__
    return Decline(f"pattern {name!r} gave a region that does not fit: {fault}", node) if fault else found


def _fault(region: Region) -> str:
    """The first thing that is wrong with the region; empty if nothing is."""
    heads, operands = region.spec.heads, (region.query, region.key, region.value)
    rows = int(shape(region.query.node)[region.query.dims.index("h")]) if region.query_heads else heads.q
    known: dict[str, Any] = {}
    for role, operand, count, width in zip(
        ("query", "key", "value"), operands, (rows, heads.k, heads.v), (heads.d_qk, heads.d_qk, heads.d_v),
        strict=True,
    ):  # fmt: skip
        fault = _placed(region, operand, role) or _sized(role, operand.node, operand.dims, known, count, width)
        if fault:
            return fault
    names = [n for dims in region.out_dims for n in dims]
    extra = {*names} - {*region.batch, "h", "q", "d"}
    if extra or not {"q", "d"} <= {*names}:
        return f"its output needs the dimensions 'q' and 'd' and may have 'h' and {region.batch}; it has {names}"
    plain = all(len(dims) == 1 for dims in region.out_dims)
    if len(region.out_dims) != len(shape(region.output)) or len(names) != len(set(names)):
        return f"its output has {len(shape(region.output))} dimensions, and {region.out_dims} were named"
    fault = _sized("output", region.output, tuple(names), known, heads.q, heads.d_v) if plain else ""
    if fault:
        return fault
    if tuple(region.captures) != tuple(c.name for c in region.spec.captures):
        return "its captures are not those of its spec, in order"
    return next((f for n, o in region.captures.items() if (f := _placed(region, o, f"capture {n}"))), "")


def _placed(region: Region, operand: Operand, role: str) -> str:
    """An operand must be a tensor that the graph has made before the output."""
    node = operand.node
    if getattr(node, "graph", region.output.graph) is not region.output.graph:
        return f"its {role} is a node of another graph"
    if not isinstance(value(node), torch.Tensor):
        return f"its {role} %{node} is no tensor"
    if len(operand.dims) != value(node).dim():
        return f"its {role} %{node} has {value(node).dim()} dimensions, and {operand.dims} were named"
    if hasattr(node, "graph") and not node < region.output:
        return f"its {role} %{node} is made after the output"
    return ""


def _sized(role: str, node: Any, dims: tuple[Any, ...], known: dict[str, Any], heads: int, width: int) -> str:
    """Each named dimension must be as long as the spec, or another operand, says."""
    for dim, size in zip(dims, shape(node), strict=True):
        if not isinstance(dim, str):
            continue
        wanted = {"h": heads, "d": width}.get(dim) or known.setdefault(dim, size)
        if size != wanted:
            return f"dimension {dim!r} of its {role} %{node} has {size} elements where {wanted} are needed"
    return ""
