"""Sums of products: which elements of two operands meet in one element of the result."""

from __future__ import annotations

from typing import Any

import sympy as sp
from torch import fx

from attnopt.graph import arguments, op_name, value
from attnopt.patterns.views import Index, shape

Side = tuple[fx.Node, Index]


def contract(node: fx.Node, index: Index, summed: sp.Symbol) -> tuple[Side, Side] | None:
    """The two operands' indices that are multiplied and summed over `summed`; None if this is no such sum."""
    name = op_name(node)
    if name in ("aten::matmul", "aten::bmm", "aten::mm"):
        left, right = node.args[0], node.args[1]
        return _matmul(left, right, index, summed)
    if name == "aten::baddbmm":
        return _matmul(node.args[1], node.args[2], index, summed)
    if name == "aten::einsum":
        return _einsum(node, index, summed)
    return None


def extent(node: fx.Node) -> sp.Expr:
    """How many products are summed."""
    if op_name(node) == "aten::einsum":
        left, _, out = _letters(node)
        letter = next(c for c in left if c not in out)
        return shape(arguments(node)["tensors"][0])[left.index(letter)]
    return shape(node.args[1 if op_name(node) == "aten::baddbmm" else 0])[-1]


def _matmul(left: fx.Node, right: fx.Node, index: Index, summed: sp.Symbol) -> tuple[Side, Side] | None:
    ranks = value(left).dim(), value(right).dim()
    if min(ranks) < 2:
        return None
    *batch, m, n = index

    def side(node: fx.Node, rank: int, last: tuple[sp.Expr, ...]) -> Side:
        tail = batch[len(batch) - (rank - 2) :] if rank > 2 else []
        sizes = shape(node)
        return node, (*(sp.S.Zero if sizes[i] == 1 else x for i, x in enumerate(tail)), *last)

    return side(left, ranks[0], (m, summed)), side(right, ranks[1], (summed, n))


def _letters(node: fx.Node) -> tuple[str, str, str]:
    equation = arguments(node)["equation"].replace(" ", "")
    inputs, _, out = equation.partition("->")
    left, right = inputs.split(",")
    if not out and "->" not in equation:
        out = "".join(sorted(c for c in set(left + right) if (left + right).count(c) == 1))
    return left, right, out


def _einsum(node: fx.Node, index: Index, summed: sp.Symbol) -> tuple[Side, Side] | None:
    a = arguments(node)
    equation, tensors = a["equation"], a["tensors"]
    if "." in equation or len(tensors) != 2 or equation.count(",") != 1:
        return None
    left, right, out = _letters(node)
    gone = [c for c in dict.fromkeys(left + right) if c not in out]
    if len(gone) != 1 or gone[0] not in left or gone[0] not in right or len(set(left)) != len(left):
        return None
    if len(set(right)) != len(right):
        return None
    at: dict[str, Any] = {**dict(zip(out, index, strict=True)), gone[0]: summed}

    def side(tensor: fx.Node, letters: str) -> Side:
        return tensor, tuple(
            sp.S.Zero if n == 1 and at[c] != summed else at[c] for c, n in zip(letters, shape(tensor), strict=True)
        )

    return side(tensors[0], left), side(tensors[1], right)
