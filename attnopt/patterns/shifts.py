"""Row constants: what is subtracted from every logit of a row, such as its maximum, changes no softmax."""

from __future__ import annotations

import operator
from typing import Any

import sympy as sp
from torch import fx

from attnopt import expr as ex
from attnopt.graph import arguments, op_name
from attnopt.patterns.contraction import is_contraction
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import split
from attnopt.patterns.views import CASTS, Index, same, shape

_SAME = {*CASTS, "aten::detach", "aten::alias", "aten::clone", "aten::contiguous"}


def unshifted(logits: list[sp.Expr], lifter: Lifter) -> list[sp.Expr]:
    """The logits of one row (the first is that of key `k`) without the row's maximum, if that is subtracted from all.

    Where the maximum is infinite the source's row is NaN, and so is the softmax of the row itself.
    """
    shift = shift_of(logits[0], lifter)
    if shift == 0:
        return logits
    moved = [remove(x, shift) for x in logits]
    if any(x is None for x in moved) or not matches(shift, moved[0], lifter):  # type: ignore[arg-type]
        return logits
    return moved  # type: ignore[return-value]


def shift_of(logit: sp.Expr, lifter: Lifter) -> sp.Expr:
    """The terms of the first sum in the logit that hold a row's maximum and no key."""
    for node in sp.preorder_traversal(logit):
        if isinstance(node, sp.Add):
            terms = [t for t in node.args if not t.has(ex.k) and _maxima(t, lifter)]
            if terms:
                return sp.Add(*terms)
        elif isinstance(node, (ex.Load, sp.exp)) and node is not logit:
            continue
    return sp.S.Zero


def remove(logit: sp.Expr, shift: sp.Expr) -> sp.Expr | None:
    """`logit - shift` where the shift is a term of every branch; None where it is not."""
    if logit == ex.NEG_INF:
        return logit
    if isinstance(logit, ex.Where):
        branches = [remove(x, shift) for x in logit.args[1:]]
        return None if None in branches else ex.Where(logit.args[0], *branches)
    moved = logit - shift
    return None if any(a in moved.atoms(ex.Load) for a in shift.atoms(ex.Load)) and moved != 0 else moved


def matches(shift: sp.Expr, logit: sp.Expr, lifter: Lifter) -> bool:
    """Whether every maximum in the shift is that of this row's logits, with or without their mask."""
    return all(_is_of_row(load, -shift.coeff(load), logit, lifter) for load in _maxima(shift, lifter))


def _maxima(expr: sp.Expr, lifter: Lifter) -> list[ex.Load]:
    return [load for load in expr.atoms(ex.Load) if maximum(lifter.nodes.get(load.args[0].name)) is not None]


def maximum(node: Any) -> tuple[fx.Node, tuple[int, ...], bool] | None:
    """For a maximum: its source, the dimensions that it runs over, and whether they stay."""
    while op_name(node) in _SAME:
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0] if op_name(node.args[0]) == "aten::max.dim" else None
    if op_name(node) not in ("aten::amax", "aten::max.dim", "aten::max."):
        return None
    a = arguments(node)
    source = a["self"]
    rank, dims = len(shape(source)), a.get("dim", ())
    dims = [dims] if isinstance(dims, int) else list(dims) or range(rank)
    return source, tuple(sorted(d % rank for d in dims)), bool(a.get("keepdim"))


def _product(logit: sp.Expr, rank: int, lifter: Lifter) -> tuple[sp.Expr, ...]:
    """Where the logit reads the product that its scores are, if that has so many dimensions."""
    loads = sorted(logit.atoms(ex.Load), key=str)
    found = [x.args[1:] for x in loads if is_contraction(lifter.nodes.get(x.args[0].name)) and len(x.args) == rank + 1]
    return found[0] if found else ()


def _place(index: list[sp.Expr], dims: tuple[int, ...], stays: bool, of: tuple[sp.Expr, ...]) -> Index | None:
    """The element of a maximum's source at key `k`: of further dimensions, that of the row itself."""
    for dim in dims:
        more = ex.k if len(dims) == 1 else of[dim] if of else None
        if more is None:
            return None
        index[dim : dim + stays] = [more]
    return tuple(index) if ex.k in index else None


def _is_of_row(load: ex.Load, factor: sp.Expr, logit: sp.Expr, lifter: Lifter) -> bool:
    """Whether a load is the maximum of the row's logits, divided by `factor` (0 where it stands inside a function)."""
    found = maximum(lifter.nodes[load.args[0].name])
    assert found is not None
    source, dims, stays = found
    at = _place(list(load.args[1:]), dims, stays, _product(logit, len(shape(source)), lifter))
    if at is None:
        return False
    row = ex.canon(ex.as_number(lifter.lift(source, at)))
    whole = shape(source)[at.index(ex.k)]
    if not same(whole, lifter.sizes.sizes[ex.k]) and not sp.expand(whole - lifter.sizes.sizes[ex.k]).is_Integer:
        return False
    logit = ex.canon(logit)
    if row == logit or (factor.is_positive and ex.canon(sp.expand(factor * row)) == logit):
        return True
    # The maximum of the scores without their mask, or of scores of another scale, is as finite as they are.
    ratio = sp.cancel(split(logit).score / split(row).score)
    return bool(ratio.is_number and ratio.is_positive)
