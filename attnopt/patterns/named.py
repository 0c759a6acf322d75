"""Attentions that are known by name and stay as they are: each is declined with what it is and why it is not fused.

A row of `_BEFORE` or `_AFTER` is a test on what stands between the product of queries and keys and the softmax, or
between the softmax and the product with the values. The patterns that fuse have the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx

from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.contraction import is_contraction
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.pointwise import PRODUCTS, is_activation, leads
from attnopt.patterns.softmax import SOFTMAX
from attnopt.patterns.views import CASTS, VIEWS, shape
from attnopt.region import Region

_CONVOLUTIONS = {"aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"}
_MIXERS = {"aten::linear", "aten::einsum", "aten::matmul", "aten::tensordot"}
_SORTS = {"aten::sort", "aten::topk", "aten::kthvalue"}
_SUMS = {"aten::sum", "aten::logsumexp", *SOFTMAX}
_LIGHT = {*POINTWISE, *VIEWS, *CASTS, "aten::dropout", "aten::tril", "aten::triu", "aten::amax", "aten::amin"}
_HEAVY = {
    *_CONVOLUTIONS, *_SORTS, *_SUMS, "aten::cumsum", "aten::gather", "aten::scatter", "aten::cdist", "aten::norm",
    "aten::batch_norm", "aten::group_norm", "aten::linalg_vector_norm", "aten::cat",
}  # fmt: skip
# What may stand between mixed weights and the values; before the softmax a norm ends the scores' own way.
_NORMS = {"aten::layer_norm", "aten::rms_norm", "aten::instance_norm"}
_STEPS = 96

Trail = list[fx.Node]
Row = tuple[Callable[[Trail], "fx.Node | None"], str]


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """What a softmax, or a product with values without one, is called, if it is an attention that is not fused."""
    if op_name(node) in SOFTMAX:
        after = _forward(node)
        if after is None:
            return None
        before = _back(node.args[0], _mixes)  # type: ignore[arg-type]
        made = _product(_back(node.args[0]))  # type: ignore[arg-type]
        scores = made is not None and _of_queries(made)
        return (_first(_AFTER, after, node) if scores else None) or _first(_BEFORE, before, node)
    if op_name(node) not in PRODUCTS or value(node).dim() < 3:
        return None
    telling = _SORTS | _SUMS | {"aten::cdist"}
    weights = next((x for x in node.all_input_nodes if leads(x, telling, _LIGHT | _HEAVY)), None)
    if weights is None:
        return None
    trail = _back(weights, _mixes)
    return None if any(op_name(n) in SOFTMAX for n in trail) else _first(_ALONE, trail, node)


def _first(rows: Iterable[Row], trail: Trail, node: fx.Node) -> Decline | None:
    for test, reason in rows:
        found = test(trail)
        if found is not None:
            return Decline(reason, found)
    return None


def _back(node: fx.Node, mixes: Callable[[fx.Node], bool] = lambda node: False) -> Trail:
    """Everything behind a node up to products of two computed tensors, those included."""
    queue, trail = [node], [node]
    while queue and len(trail) < _STEPS:
        current = queue.pop(0)
        if op_name(current) not in _LIGHT | _HEAVY and not mixes(current) and op_name(current):
            continue
        for source in current.all_input_nodes:
            if source not in trail and source.op == "call_function":
                trail.append(source)
                queue.append(source)
    return trail


def _forward(node: fx.Node) -> Trail | None:
    """Everything between a softmax and the first product of two computed tensors; None if there is none."""
    queue, trail = [node], [node]
    while queue and len(trail) < _STEPS:
        current = queue.pop(0)
        for user in current.users:
            if is_contraction(user) and op_name(user) in PRODUCTS and not _mixes(user):
                return trail
            known = op_name(user) in _LIGHT | _HEAVY | _NORMS
            if user not in trail and (known or _mixes(user) or not op_name(user)):
                trail.append(user)
                queue.append(user)
    return None


def _mixes(node: fx.Node) -> bool:
    """Whether the node is a product of one computed tensor with vectors and matrices that are parameters."""
    if op_name(node) not in _MIXERS:
        return False
    operands = [x for x in node.all_input_nodes if isinstance(value(x), torch.Tensor)]
    learned = [x for x in operands if not is_activation(x)]
    return len(operands) - len(learned) == 1 and all(value(x).dim() <= 2 for x in learned)


# --- the forms -------------------------------------------------------------------------------------


def _product(trail: Trail) -> fx.Node | None:
    return next((n for n in trail if is_contraction(n) and not _mixes(n) and op_name(n) != "aten::sum"), None)


def _convolved(trail: Trail) -> fx.Node | None:
    """A convolution of what a product made (or, after the softmax, of the weights)."""
    found = next((n for n in trail if op_name(n) in _CONVOLUTIONS), None)
    if found is None or (op_name(trail[0]) not in SOFTMAX and _product(_back(found.args[0])) is None):  # type: ignore[arg-type]
        return None
    kernel = shape(found.args[1])[2:]
    return found if any(n != 1 for n in kernel) else None


def _heads_mixed(trail: Trail) -> fx.Node | None:
    """A linear map (or a convolution of one place) across the heads."""
    for node in trail:
        single = op_name(node) in _CONVOLUTIONS and all(n == 1 for n in shape(node.args[1])[2:])
        if not single and not (_mixes(node) and value(node).dim() > 3):
            continue
        source = next(x for x in node.all_input_nodes if is_activation(x))
        if op_name(trail[0]) in SOFTMAX or _product(_back(source)) is not None:
            return node
    return None


def _balanced(trail: Trail) -> fx.Node | None:
    """Sums along one dimension and along another, more than once."""
    sums = [n for n in trail if op_name(n) in _SUMS and value(n.args[0]).dim() > 2]
    dims = [arguments(n).get("dim") for n in sums]
    known = {(d if isinstance(d, int) else d[0]) % value(n.args[0]).dim() for d, n in zip(dims, sums, strict=True) if d}
    return sums[0] if len(sums) > 2 and len(known) > 1 else None


def _sorted(trail: Trail) -> fx.Node | None:
    found = next((n for n in trail if op_name(n) == "aten::sort"), None)
    summed = any(op_name(n) == "aten::cumsum" for n in trail)
    return found if found is not None and summed and _of_scores(found) else None


def _chosen(trail: Trail) -> fx.Node | None:
    found = next((n for n in trail if op_name(n) in _SORTS), None)
    return found if found is not None and (op_name(trail[0]) in SOFTMAX or _of_scores(found)) else None


def _of_scores(node: fx.Node) -> bool:
    """Whether what is sorted is made by a product of two computed tensors; a router's logits are a linear map."""
    made = _product(_back(node.args[0]))  # type: ignore[arg-type]
    return made is not None and _of_queries(made)


def _crossed(trail: Trail) -> fx.Node | None:
    """A sum or difference of one tensor by query and one by key, each broadcast along the other's position."""
    for node in trail:
        inputs = [x for x in node.args[:2] if isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor)]
        if op_name(node) not in ("aten::add", "aten::sub") or len(inputs) != 2 or not all(map(is_activation, inputs)):
            continue
        rank = value(node).dim()
        left, right = ([1] * (rank - len(shape(x))) + list(shape(x)) for x in inputs)
        wide = [i for i in range(rank) if left[i] != right[i]]
        if any(left[i] == 1 for i in wide) and any(right[i] == 1 for i in wide) and _product(trail) is None:
            return node
    return None


def _additive(trail: Trail) -> fx.Node | None:
    """`w . tanh(q + k)`, or a linear map of query and key put behind one another."""
    mixed = next((n for n in trail if _mixes(n) and shape(n)[-1] == 1), None)
    if mixed is None or _product(trail) is not None:
        return None
    behind = _back(mixed.args[0], _mixes)  # type: ignore[arg-type]
    pairs = [n for n in behind if op_name(n) == "aten::cat" and len(n.all_input_nodes) == 2 and value(n).dim() > 3]
    return mixed if _crossed(behind) is not None or pairs else None


def _by_sum(trail: Trail) -> fx.Node | None:
    """`a(q) + b(k)`: a graph attention's score."""
    found = _crossed(trail)
    return found if found is not None and op_name(found) == "aten::add" else None


def _distances(trail: Trail) -> fx.Node | None:
    """Distances of queries and keys, other than by the product that they contain."""
    direct = next((n for n in trail if op_name(n) == "aten::cdist" and all(map(_batched, n.all_input_nodes))), None)
    if direct is not None:
        return direct
    found = _crossed(trail)
    squared = any(op_name(n) in ("aten::pow", "aten::square", "aten::norm", "aten::linalg_vector_norm") for n in trail)
    summed = any(op_name(n) in ("aten::sum", "aten::norm", "aten::linalg_vector_norm") for n in trail)
    return found if found is not None and op_name(found) == "aten::sub" and squared and summed else None


def _of_queries(product: fx.Node) -> bool:
    """Whether a product is of a query and a key for each of a batch. Either may be learned, but not both."""
    operands = product.all_input_nodes
    return all(value(x).dim() > 2 for x in operands) and any(map(is_activation, operands))


def _batched(node: fx.Node) -> bool:
    return value(node).dim() > 2 and is_activation(node)


_SPARSE = (
    (_sorted, "sparsemax or entmax: each row's weights follow from its sorted scores, so the whole row must be there"),
    (_chosen, "top-k attention: which keys are kept follows from the sorted scores, so the whole row must be there"),
)
_BEFORE = (
    (_convolved, "multi-token attention: a convolution mixes the scores of neighbouring queries and keys"),
    (_heads_mixed, "talking heads: a linear map mixes the scores of all heads before the softmax"),
    *_SPARSE,
    (_distances, "Gaussian kernel attention: the scores are distances that no product of queries and keys makes"),
    (_additive, "additive attention: the scores are a linear map of query and key together, no product of the two"),
    (_by_sum, "graph attention: a score is a sum of a number of the query and one of the key, no product of the two"),
)
_AFTER = (
    (_balanced, "Sinkhorn attention: rows and columns are normalised in turn, so all scores must be there"),
    (_convolved, "multi-token attention: a convolution mixes the weights of neighbouring queries and keys"),
    (_heads_mixed, "talking heads: a linear map mixes the weights of all heads after the softmax"),
    (_chosen, "top-k attention: which keys are kept follows from the sorted weights, so the whole row must be there"),
)
_ALONE = (
    *_SPARSE,
    (_balanced, "Sinkhorn attention: rows and columns are normalised in turn, so all scores must be there"),
    (_distances, "Gaussian kernel attention: the scores are distances that no product of queries and keys makes"),
)
