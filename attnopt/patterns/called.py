"""`attnopt::attention` itself: a graph that holds calls of the operator is read like any other."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from attnopt.errors import Decline
from attnopt.graph import is_call, module_path, op_name, source_line
from attnopt.region import Operand, Region
from attnopt.spec import AttentionSpec


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention that one call of the operator is: its spec stands in the call."""
    if op_name(node) != "attnopt::attention":
        return None
    query, key, value, captures, scalars, text = node.args
    spec = AttentionSpec.parse(text)  # type: ignore[arg-type]
    outputs = [user for user in node.users if is_call(user, operator.getitem) and user.args[1] == 0]
    if len(outputs) != len(node.users) or len(outputs) != 1:
        return Decline("the operator's log-sum-exp is used too, so the call stays as it is", node)
    loaded = zip(spec.captures, captures, strict=False)  # type: ignore[arg-type]
    return Region(
        spec=spec, output=outputs[0], out_dims=(("b",), ("h",), ("q",), ("d",)), batch=("b",),
        query=Operand(query, ("b", "h", "q", "d")), key=Operand(key, ("b", "h", "k", "d")),
        value=Operand(value, ("b", "h", "k", "d")),
        captures={c.name: Operand(x, tuple(f"i{i}" for i in range(len(c.shape)))) for c, x in loaded},
        scalars=dict(zip(spec.scalars, scalars, strict=False)),  # type: ignore[arg-type]
        anchor=node, pattern="attnopt", source=source_line(node), module_path=module_path(node),
        inner=frozenset((node, outputs[0])),
    )  # fmt: skip
