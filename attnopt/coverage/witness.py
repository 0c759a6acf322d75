"""How many attentions a graph holds, counted without the patterns, so that a site that none of them sees shows.

Plain reachability: a softmax is an attention if, going back from its argument and forward from its result without
crossing a layer (a product with a parameter, a norm, a convolution, another softmax), both ways meet a contraction of
two computed tensors. `scaled_dot_product_attention` is one by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.graph import op_name, value

SDPA = "aten::scaled_dot_product_attention"
SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::special_softmax", "aten::log_softmax", "aten::_log_softmax"}
CONTRACTIONS = {"aten::matmul", "aten::bmm", "aten::einsum", "aten::baddbmm", "aten::mm", "aten::addbmm"}
LAYERS = {
    "aten::linear", "aten::addmm", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution",
    "aten::conv_transpose1d", "aten::conv_transpose2d", "aten::layer_norm", "aten::group_norm", "aten::batch_norm",
    "aten::rms_norm", "aten::native_layer_norm", "aten::embedding", "aten::gelu", "aten::silu", "aten::topk",
    "aten::sort", "aten::argmax", "aten::rsqrt", "aten::_grouped_mm", "aten::sigmoid_",
}  # fmt: skip
NORMALIZERS = {
    "softmax", "log_softmax", "_softmax", "softmin", "gumbel_softmax", "scaled_dot_product_attention",
    "multi_head_attention_forward", "flex_attention", "exp",
}  # fmt: skip
"""Names of calls, as users write them, that may make weights."""
_STOP = {*SOFTMAX, *LAYERS, SDPA}


@dataclass(frozen=True)
class Witness:
    """Names of the anchors that must be sites, and of the normalisers that feed no contraction or stem from none."""

    sites: tuple[str, ...]
    others: tuple[str, ...]


def witness(graph: fx.Graph) -> Witness:
    """Count the graph's attentions."""
    sites, others = [], []
    for node in graph.nodes:
        name = op_name(node)
        if name == SDPA:
            sites.append(node.name)
        elif name in SOFTMAX or _by_hand(node):
            found = _meets(node, _back) and _meets(node, _forward)
            (sites if found else others).append(node.name)
    return Witness(tuple(sites), tuple(others))


def normalizers(graph: fx.Graph) -> list[fx.Node]:
    """The calls of a graph of the user's own operators that may make weights; without any there is no softmax."""
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    return [n for n in calls if getattr(n.target, "__name__", n.target) in NORMALIZERS]


def _by_hand(node: fx.Node) -> bool:
    """An exponential whose sum divides it."""
    if op_name(node) != "aten::exp":
        return False
    sums = [u for u in node.users if op_name(u) == "aten::sum"]
    return any(op_name(d) == "aten::div" and d.args[0] is node for s in sums for d in s.users)


def _back(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _forward(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _meets(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether the walk meets a contraction of two computed tensors before a layer."""
    queue, seen = list(step(start)), {start}
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        name = op_name(node)
        if name in CONTRACTIONS:
            if _computed(node):
                return True
            continue
        if name not in _STOP and node.op == "call_function":
            queue.extend(step(node))
    return False


def _computed(node: fx.Node) -> bool:
    """Whether no operand of the contraction is a weight matrix, however viewed."""
    return not any(_is_weight(n) for n in node.all_input_nodes)


def _is_weight(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    seen = value(node)
    return node.op in ("placeholder", "get_attr") and isinstance(seen, torch.Tensor) and seen.dim() <= 2
