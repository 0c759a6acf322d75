"""Near misses: the operator that stands between a softmax and a product of queries and keys."""

from __future__ import annotations

import operator

from torch import fx

from attnopt.graph import op_name
from attnopt.patterns.contraction import is_contraction
from attnopt.patterns.gathers import GATHERS
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import CASTS, VIEWS

_KNOWN = frozenset({
    *POINTWISE, *VIEWS, *CASTS, *GATHERS, "aten::dropout", "aten::split", "aten::split_with_sizes", "aten::chunk",
    "aten::unbind", "aten::sym_size", "aten::arange", "aten::zeros", "aten::zeros_like", "aten::new_zeros",
    "aten::ones", "aten::ones_like", "aten::new_ones", "aten::full", "aten::full_like", "aten::new_full",
    "aten::scalar_tensor",
})  # fmt: skip
# What is further back than this explains nothing to a reader.
_MOST = 200


def blocking(anchor: fx.Node) -> fx.Node | None:
    """The last operator behind the anchor that is no known function of its inputs; None if all are known."""
    queue, seen, unknown = list(anchor.all_input_nodes), {anchor}, []
    while queue and len(seen) < _MOST:
        node = queue.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_contraction(node):
            continue
        if op_name(node) in _KNOWN or node.target is operator.getitem:
            queue.extend(node.all_input_nodes)
        else:
            unknown.append(node)
    return max(unknown, default=None)
