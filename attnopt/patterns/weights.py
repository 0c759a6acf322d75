"""What becomes of the weights between the normaliser and the values: factors, masks applied again, guards.

Between the two, the weights may be multiplied, set to zero where a mask says so, and cleaned of NaN. A row without
any kept key then yields zeros instead of NaN or a mean; what says nothing new goes, the rest is the spec's `weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy as sp
from sympy.logic.boolalg import Boolean, BooleanFunction
from torch import fx

from attnopt import expr as ex
from attnopt.graph import arguments, op_name
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked, split
from attnopt.patterns.ops import Filled, Missing
from attnopt.patterns.views import same, shape
from attnopt.spec import EmptyRow

P = sp.Symbol("weight", real=True)
_DROPS = "weights are set to zero by a mask that is not the scores' own, where empty rows are NaN"


class Some(BooleanFunction):
    """`Some(c)`: whether the condition holds for any key of the row."""


@dataclass(frozen=True)
class Weights:
    """`factor` times the normalised weight; zero unless all of `kept`; zero for NaN where `filled`."""

    factor: sp.Expr
    kept: tuple[Boolean, ...] = ()
    filled: bool = False


def read(expr: sp.Basic, weight: sp.Expr = P) -> Weights | None:
    """The expression as a multiple of `weight`, or None where it is none."""
    if expr == weight:
        return Weights(sp.S.One)
    if isinstance(expr, ex.Where):
        return _selected(*expr.args, weight)
    if isinstance(expr, Filled):
        inner = read(expr.args[0], weight)
        return replace(inner, filled=True) if inner is not None and expr.args[1] == 0 and _plain(inner) else None
    if isinstance(expr, sp.Mul):
        within = [a for a in expr.args if a.has(weight)]
        inner = read(within[0], weight) if len(within) == 1 else None
        if inner is None:
            return None
        return replace(inner, factor=sp.Mul(inner.factor, *[a for a in expr.args if a is not within[0]]))
    if isinstance(expr, sp.Add):
        parts = [read(a, weight) for a in expr.args]
        found = [p for p in parts if p is not None and not p.kept and not p.filled]
        return Weights(sp.Add(*[p.factor for p in found])) if len(found) == len(parts) else None
    return None


def _selected(c: Boolean, x: sp.Expr, y: sp.Expr, weight: sp.Expr) -> Weights | None:
    if isinstance(c, (Missing, sp.Not)) and c.has(Missing):
        tested, chosen, fill = (c.args[0], y, x) if isinstance(c, Missing) else (c.args[0].args[0], x, y)
        inner = read(chosen, weight)
        return replace(inner, filled=True) if inner and fill == 0 and tested == chosen and _plain(inner) else None
    if c.has(weight):
        return None
    if x == 0 or y == 0:
        inner = read(x if y == 0 else y, weight)
        return replace(inner, kept=(*inner.kept, c if y == 0 else sp.Not(c))) if inner else None
    parts = [p for p in (read(x, weight), read(y, weight)) if p is not None and not p.kept and not p.filled]
    return Weights(ex.Where(c, parts[0].factor, parts[1].factor)) if len(parts) == 2 else None


def _plain(found: Weights) -> bool:
    """Whether only the softmax itself can be NaN here, and not a loaded factor."""
    return not any(not isinstance(load, ex.IntLoad) for load in found.factor.atoms(ex.Load))


# --- conditions on whole rows ----------------------------------------------------------------------


def resolve(expr: sp.Basic, lifter: Lifter) -> sp.Basic:
    """The expression with every loaded `any` or `all` over the keys as a condition `Some`."""
    found: dict[sp.Basic, sp.Basic] = {}
    for load in expr.atoms(ex.IntLoad):
        node = lifter.nodes.get(load.args[0].name)
        if op_name(node) not in ("aten::any", "aten::all") or not isinstance(node, fx.Node):
            continue
        inner = _over_keys(node, load.args[1:], lifter)
        if inner is None:
            continue
        some = Some(ex.canon(inner)) if op_name(node) == "aten::any" else sp.Not(Some(ex.canon(sp.Not(inner))))
        found |= {sp.Ne(load, 0): some, sp.Eq(load, 0): sp.Not(some), load: ex.Where(some, sp.S.One, sp.S.Zero)}
    return expr.xreplace(found) if found else expr


def _over_keys(node: fx.Node, index: tuple[sp.Expr, ...], lifter: Lifter) -> Boolean | None:
    """What is tested for each key, where the test runs over exactly the site's keys."""
    a = arguments(node)
    source, dim = node.args[0], a.get("dim")
    if not isinstance(dim, int) or any(i.has(ex.k) for i in index):
        return None
    sizes = shape(source)
    place = dim % len(sizes)
    if not same(sizes[place], lifter.sizes.sizes[ex.k]):
        return None
    at = [*index[:place], ex.k, *index[place + 1 :]] if a.get("keepdim") else [*index[:place], ex.k, *index[place:]]
    found = lifter.lift(source, tuple(at))
    return ex.truth(found)


def guarded(logit: sp.Expr, lifter: Lifter) -> Masked:
    """The logit as score and mask, where a test of the whole row may stand around it.

    Rows without a kept key that are given one score for all keys have equal weights.
    """
    resolved = ex.canon(resolve(logit, lifter))
    if isinstance(resolved, ex.Where) and resolved.args[0].has(Some):
        c, x, y = resolved.args
        fill, inner = (y, x) if isinstance(c, Some) else (x, y)
        some = c if isinstance(c, Some) else ex.canon(sp.Not(c))
        masked = split(inner, lifter.finite)
        if isinstance(some, Some) and fill.is_number and fill.is_finite and _same(some.args[0], masked.keep):
            return replace(masked, empty_row=EmptyRow.UNIFORM)
    return split(ex.canon(logit), lifter.finite, lifter.limit)


# --- together with the mask of the scores ----------------------------------------------------------


def settle(found: Weights, masked: Masked, lifter: Lifter) -> tuple[Masked, sp.Expr] | str:
    """The mask with what an empty row finally yields, and the factor that is left; or why they do not go together."""
    policy = masked.empty_row
    if found.filled and policy is EmptyRow.NAN:
        policy = EmptyRow.ZERO
    factor = sp.S.One
    for condition in found.kept:
        test = ex.canon(resolve(condition, lifter))
        if _decides(test, masked.keep):
            policy = EmptyRow.ZERO
        elif policy is EmptyRow.NAN and not never_empty(masked.keep, lifter):
            return _DROPS
        elif not _implied(test, masked.keep) or policy is EmptyRow.UNIFORM:
            factor = factor * ex.Where(condition, sp.S.One, sp.S.Zero)
    for term in sp.Mul.make_args(found.factor):
        test = ex.canon(resolve(term.args[0], lifter)) if _is_test(term) else None
        if test is None or not _implied(test, masked.keep):
            factor = factor * term
        elif policy is EmptyRow.UNIFORM:
            if not _decides(test, masked.keep):
                factor = factor * term
            else:
                policy = EmptyRow.ZERO
    return replace(masked, empty_row=policy), ex.canon(factor)


def _is_test(term: sp.Expr) -> bool:
    return isinstance(term, ex.Where) and term.args[1:] == (1, 0)


def _decides(test: Boolean, keep: Boolean) -> bool:
    """Whether the test fails for every key of an empty row, and holds wherever a key is kept."""
    return _same(test.args[0], keep) if isinstance(test, Some) else _same(test, keep)


def _implied(test: Boolean, keep: Boolean) -> bool:
    """Whether the test holds wherever a key is kept."""
    inner = test.args[0] if isinstance(test, Some) else test
    return set(ex.conjuncts(ex.canon(inner))) <= set(ex.conjuncts(ex.canon(keep)))


def _same(x: Boolean, y: Boolean) -> bool:
    return bool(ex.canon(x) == ex.canon(y))


def never_empty(keep: Boolean, lifter: Lifter | None = None) -> bool:
    """Whether every row keeps a key for certain: its first, or the one at its own place where there is such a key."""
    sizes = {} if lifter is None else lifter.sizes.sizes
    own = {ex.q, ex.k} <= sizes.keys() and same(sizes[ex.q], sizes[ex.k])
    at = (sp.S.Zero, ex.q) if own else (sp.S.Zero,)
    return keep == sp.true or any(ex.canon(keep.xreplace({ex.k: place})) == sp.true for place in at)


def unresolved(exprs: Iterable[sp.Basic]) -> bool:
    """Whether a test of a whole row is left, which no spec can hold."""
    return any(e.has(Some, Missing, Filled) for e in exprs)
