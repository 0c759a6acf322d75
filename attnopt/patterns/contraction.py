"""Sums of products: which elements of two operands meet in one element of the result."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp
import torch
from torch import fx

from attnopt.graph import arguments, op_name, value
from attnopt.patterns.views import Index, shape

Side = tuple[fx.Node, Index]
# How two operands are multiplied and summed: labels of each one's dimensions, then the labels of the result.
Labels = tuple[list[tuple[fx.Node, list[str]]], list[str]]


def is_contraction(node: object) -> bool:
    """Whether the node sums products of two tensors (or more) over one dimension."""
    return isinstance(node, fx.Node) and _labels(node) is not None


def contract(node: fx.Node, index: Index, summed: sp.Symbol) -> tuple[Side, Side] | None:
    """The two operands' indices that are multiplied and summed over `summed`; None if this is no such sum of two."""
    found = operands(node, index, summed)
    return (found[0], found[1]) if len(found) == 2 else None


def pair(node: fx.Node, index: Index, summed: sp.Symbol) -> tuple[Side, Side] | None:
    """Like `contract`, of a sum that may be multiplied by `factors`."""
    found = [side for side in operands(node, index, summed) if summed in side[1]]
    return (found[0], found[1]) if len(found) == 2 else None


def factors(node: fx.Node, index: Index) -> list[Side]:
    """What else the sum is multiplied by: operands of an `einsum` that do not take part in the summation."""
    mark = sp.Symbol("summed", integer=True, nonnegative=True)
    return [side for side in operands(node, index, mark) if mark not in side[1]]


def operands(node: fx.Node, index: Index, summed: sp.Symbol) -> list[Side]:
    """Every operand with its index, in order; empty if this is no sum of products over one dimension."""
    labels = _labels(node)
    if labels is None or len(labels[1]) != len(index):
        return []
    sides, out = labels
    (gone,) = {c for _, own in sides for c in own if c not in out}
    at = {**dict(zip(out, index, strict=True)), gone: summed}

    long = {c for tensor, own in sides for c, n in zip(own, shape(tensor), strict=True) if n != 1}

    def side(tensor: fx.Node, own: list[str]) -> Side:
        sizes = shape(tensor)
        return tensor, tuple(sp.S.Zero if n == 1 and c in long else at[c] for c, n in zip(own, sizes, strict=True))

    return [side(tensor, own) for tensor, own in sides]


def extent(node: fx.Node) -> sp.Expr:
    """How many products are summed. Raises `ValueError` if the node is no contraction."""
    labels = _labels(node)
    if labels is None:
        raise ValueError(f"{node} sums no products over one dimension")
    sides, out = labels
    return next(n for tensor, own in sides for c, n in zip(own, shape(tensor), strict=True) if c not in out)


def lengths(node: fx.Node) -> frozenset[sp.Expr]:
    """The summed dimension's length, once for each name it has: the operator refuses tensors where they differ."""
    sides, out = _labels(node) or ([], [])
    return frozenset(n for tensor, own in sides for c, n in zip(own, shape(tensor), strict=True) if c not in out)


def _labels(node: fx.Node) -> Labels | None:
    """The node as labelled dimensions; None if it is no sum over one dimension that two operands or more have."""
    rule = _RULES.get(op_name(node))
    found = rule(node) if rule is not None else None
    if found is None:
        return None
    sides, out = found
    gone = {c for _, own in sides for c in own if c not in out}
    summed = [shape(tensor)[own.index(c)] for tensor, own in sides for c in gone & set(own)]
    if len(gone) != 1 or len(summed) < 2 or not _meet(node, summed) or len(set(out)) != len(out):
        return None
    if any(len(set(own)) != len(own) for _, own in sides) or set(out) - {c for _, own in sides for c in own}:
        return None
    return found


def _meet(node: fx.Node, summed: list[sp.Expr]) -> bool:
    """Whether the summed dimensions are equally long: by their sizes, or since the operator broadcasts none of them."""
    return all(n == summed[0] for n in summed) or (
        op_name(node) in _STRICT and not any(n.is_Integer and summed[0].is_Integer and n != summed[0] for n in summed)
    )


def _matmul(node: fx.Node) -> Labels | None:
    first = 1 if op_name(node) in ("aten::baddbmm", "aten::addmm") else 0
    left, right = node.args[first], node.args[first + 1]
    ranks = value(left).dim(), value(right).dim()
    if min(ranks) < 1 or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    batch = [f"b{i}" for i in reversed(range(max(ranks) - 2))]
    rows, columns = ["m"] if ranks[0] > 1 else [], ["n"] if ranks[1] > 1 else []

    def own(rank: int, last: list[str]) -> list[str]:
        return [*batch[len(batch) - max(rank - 2, 0) :], *last]

    return [(left, own(ranks[0], [*rows, "d"])), (right, own(ranks[1], ["d", *columns]))], [*batch, *rows, *columns]


def _summed_batch(node: fx.Node) -> Labels | None:
    """`addbmm` sums over the batch as well: no product of one query and one key."""
    return None


def _einsum(node: fx.Node) -> Labels | None:
    a = arguments(node)
    inputs, arrow, output = a["equation"].replace(" ", "").partition("->")
    terms, tensors = inputs.split(","), a["tensors"]
    if len(terms) != len(tensors):
        return None
    if not arrow:
        letters = inputs.replace(",", "").replace("...", "")
        output = ("..." if "..." in inputs else "") + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)

    def label(term: str, count: int) -> list[str]:
        before, ellipsis, after = term.partition("...")
        own = [f"{i}." for i in reversed(range(count))] if ellipsis else []
        return [*before, *own, *after]

    counts = [value(t).dim() - len(term.replace("...", "")) for term, t in zip(terms, tensors, strict=True)]
    sides = [(t, label(term, count)) for term, t, count in zip(terms, tensors, counts, strict=True)]
    return sides, label(output, max(counts))


def _tensordot(node: fx.Node) -> Labels | None:
    a = arguments(node)
    left, right = a["self"], a["other"]
    names = [f"l{i}" for i in range(value(left).dim())], [f"r{i}" for i in range(value(right).dim())]
    for i, j in zip(a["dims_self"], a["dims_other"], strict=True):
        names[1][j] = names[0][i]
    shared = set(names[0]) & set(names[1])
    return [(left, names[0]), (right, names[1])], [c for own in names for c in own if c not in shared]


def _inner(node: fx.Node) -> Labels | None:
    left, right = node.args[0], node.args[1]
    names = [[f"{side}{i}" for i in range(value(x).dim() - 1)] for side, x in (("l", left), ("r", right))]
    return [(left, [*names[0], "d"]), (right, [*names[1], "d"])], [*names[0], *names[1]]  # type: ignore[list-item]


def _summed_product(node: fx.Node) -> Labels | None:
    """`(x * y).sum(dim)`, where neither operand is broadcast along the dimension."""
    a = arguments(node)
    product, dims = node.args[0], a.get("dim")
    if op_name(product) != "aten::mul" or not isinstance(dims, (list, tuple, int)) or a.get("dtype") is not None:
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    pair = product.args  # type: ignore[union-attr]
    if len(dims) != 1 or not all(isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor) for x in pair):
        return None
    rank = value(product).dim()
    gone, out = f"x{dims[0] % rank}", [f"x{i}" for i in range(rank)]
    sides = [(x, out[rank - value(x).dim() :]) for x in pair]
    if any(gone not in own or shape(x)[own.index(gone)] == 1 for x, own in sides):
        return None
    if a.get("keepdim"):
        return None
    return sides, [c for c in out if c != gone]  # type: ignore[return-value]


_RULES: dict[str, Callable[[fx.Node], Labels | None]] = {
    "aten::matmul": _matmul,
    "aten::bmm": _matmul,
    "aten::mm": _matmul,
    "aten::baddbmm": _matmul,
    "aten::addmm": _matmul,
    "aten::mv": _matmul,
    "aten::addbmm": _summed_batch,
    "aten::einsum": _einsum,
    "aten::tensordot": _tensordot,
    "aten::inner": _inner,
    "aten::sum": _summed_product,
}
# Products that raise where the summed dimensions differ; the others broadcast a length of one.
_STRICT = {"aten::matmul", "aten::bmm", "aten::mm", "aten::mv", "aten::baddbmm", "aten::addmm"}
# By name alone. `sum` is a contraction only of a product, and `linear` applies parameters: it makes no scores.
CONTRACTIONS = {*_RULES, "aten::linear"} - {"aten::sum"}
