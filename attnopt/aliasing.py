"""What an aten operator writes to, and which tensor its result shares memory with."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
# Operators that give several views at once; `getitem` takes one.
PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}


def mutated_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator writes to, the first if there are several, or None."""
    found = written(node)
    return found[0] if found else None


def written(node: fx.Node) -> list[fx.Node]:
    """Every tensor that an operator writes to."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return []
    found: list[fx.Node] = []
    for place, argument in enumerate(target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.node.map_arg(given, found.append)
    return found


def itself(node: fx.Node) -> fx.Node:
    """The node that made the tensor object: an in-place operator gives its target back."""
    return itself(written(node)[0]) if written(node) else node


def aliased(node: fx.Node) -> fx.Node | None:
    """The input whose storage the node's value shares, or None."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0] if node.args[0].target in PARTS or _is_view(node.args[0]) else None
    return node.args[0] if _is_view(node) and isinstance(node.args[0], fx.Node) else None  # type: ignore[return-value]


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    first = node.target._schema.arguments[0] if node.target._schema.arguments else None
    if first is None or first.alias_info is None or first.alias_info.is_write:
        return False
    if not isinstance(node.args[0], fx.Node) or not isinstance(fake_value(node), torch.Tensor):
        return True
    # `reshape`, `contiguous` and `to` alias only where no copy is needed: asked of the fake tensors themselves.
    try:
        return bool(torch._C._is_alias_of(run_fake(node), fake_value(node.args[0])))  # type: ignore[attr-defined]
    except RuntimeError:  # values traced under vmap cannot be computed with any more: assume the worst
        return True


def run_fake(node: fx.Node) -> Any:
    """The call on the fake values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_value(node: Any) -> Any:
    """What a node gave when it was traced; anything else is itself."""
    return node.meta.get("val", node.meta.get("example_value")) if isinstance(node, fx.Node) else node


def pure_target(target: Any) -> Any:
    """The operator without the trailing underscore, of the same overload, if there is one."""
    name, overload = target._schema.name.split("::")[1], target._schema.overload_name or "default"
    if name.startswith("__i") and name.endswith("__"):
        pure_name = f"__{name[3:-2]}__"
    elif name.endswith("_") and not name.endswith("__"):
        pure_name = name[:-1]
    else:
        return None
    pure = getattr(getattr(aten, pure_name, None), overload, None)
    if pure is None:
        return None
    # The written argument may have another name: `dropout_(self, ...)` and `dropout(input, ...)`.
    own, others = ([a.name for a in t._schema.arguments[1:]] for t in (target, pure))
    return pure if own == others else None
