"""Operators that have two names in aten: every later step knows one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# The second name and the first; overloads are called alike, and so are the forms that write in place.
_NAMES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat", "fix": "trunc", "ger": "outer", "linalg_matmul": "matmul",
    "special_expit": "sigmoid", "special_exp2": "exp2", "special_expm1": "expm1", "special_log1p": "log1p",
    "special_erf": "erf", "special_softmax": "softmax", "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp", "arctan": "atan", "__xor__": "bitwise_xor",
}  # fmt: skip


def _stacked(dim: int) -> Callable[[fx.Node], tuple[Any, tuple[Any, ...]] | None]:
    """A concatenation along `dim` of tensors that have the dimension; others are given one first."""

    def rule(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
        tensors: Any = node.args[0]
        ranks = {t.meta["val"].dim() for t in tensors}
        if dim == 1 and ranks == {1}:
            return aten.cat.default, (tensors, 0)
        return (aten.cat.default, (tensors, dim)) if min(ranks) > max(dim, 1) else None

    return rule


def _flat(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.flatten.using_ints, (node.args[0],)


_FORMS: dict[Any, Callable[[fx.Node], tuple[Any, tuple[Any, ...]] | None]] = {
    aten.hstack.default: _stacked(1),
    aten.vstack.default: _stacked(0),
    aten.row_stack.default: _stacked(0),
    aten.dstack.default: _stacked(2),
    aten.ravel.default: _flat,
}


def rename(graph: fx.Graph) -> None:
    """Call every operator by its first name, in place. What is computed stays the same, bit for bit."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            continue
        if node.target in _FORMS:
            form = _FORMS[node.target](node)
            if form is not None:
                node.target, node.args, node.kwargs = *form, {}
        else:
            node.target = _first(node.target)


def _first(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    name = target._schema.name.removeprefix("aten::")
    written = name.endswith("_") and not name.endswith("__")
    known = _NAMES.get(name.removesuffix("_") if written else name)
    packet = getattr(aten, f"{known}_" if written else known, None) if known else None
    overload = "int" if known in ("softmax", "log_softmax") else target._overloadname
    return getattr(packet, overload, target) if packet is not None else target
