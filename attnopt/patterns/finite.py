"""Whether a tensor of the graph is no mask: its values are finite for certain, or as certain as a product's are."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnopt.graph import op_name, value
from attnopt.patterns.contraction import CONTRACTIONS
from attnopt.patterns.gathers import GATHERS
from attnopt.patterns.known import Known
from attnopt.patterns.views import CASTS, VIEWS

# Operators whose results are finite whatever comes in, and those that keep finite values finite.
_BOUNDED = {
    "aten::embedding", "aten::layer_norm", "aten::conv1d", "aten::conv2d", "aten::sigmoid", "aten::tanh", "aten::sin",
    "aten::cos",
}  # fmt: skip
_KEEP_FINITE = {
    *GATHERS, "aten::gather", "aten::add", "aten::sub", "aten::mul", "aten::neg", "aten::relu", "aten::split",
    "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::abs", "aten::clamp",
}  # fmt: skip
_STEPS = 40
# Above this a number may be a mask's fill.
_MOST = 1e29


def is_finite(node: Any, known: Known, steps: int = _STEPS) -> bool:
    """Parameters, products, and what is picked or computed from them by operators that keep finite values finite."""
    if not isinstance(node, fx.Node):
        return isinstance(node, (int, float)) and abs(node) < _MOST
    if node.op == "placeholder" and str(node.target).startswith("p_"):
        return True
    name = op_name(node)
    if name in CONTRACTIONS or name in _BOUNDED or known.finite(node):
        return True
    if steps == 0:
        return False
    if name not in _KEEP_FINITE and name not in VIEWS and name not in CASTS:
        return node.target is operator.getitem and is_finite(node.args[0], known, steps - 1)
    sources = [n for n in node.all_input_nodes if _is_float(n)]
    numbers = [a for a in node.args if isinstance(a, float)]
    return bool(sources) and all(is_finite(x, known, steps - 1) for x in (*sources, *numbers))


def _is_float(node: fx.Node) -> bool:
    seen = value(node)
    parts = seen if isinstance(seen, (list, tuple)) else [seen]
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in parts)
