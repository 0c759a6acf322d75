"""A mask solved for the key: bounds `lo <= k < hi` where it can be, conditions where it cannot. Free of torch.

Every step is an equivalence over integer coordinates inside their extents, so spellings of one mask meet:
`k//4 == q//4`, `k - k%4 == q - q%4` and `4*(q//4) <= k < 4*(q//4) + 4` have one solution.
"""

from __future__ import annotations

from functools import lru_cache, reduce

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis.quotients import digits, quotient, tidy
from attnopt.analysis.solution import ALL, NOTHING, Below, From, Leaf, Node, both, either, nonnegative

# Case splits on conditions inside one comparison; deeper ones stay as they are.
_SPLITS = 6


@lru_cache(maxsize=1024)
def solve(keep: Boolean) -> Node:
    """The solution of a `keep` expression."""
    return _solve(ex.canon(keep), _SPLITS)


# --- one comparison --------------------------------------------------------------------------------


def _solve(condition: sp.Basic, splits: int) -> Node:
    if condition in (sp.true, sp.false):
        return ALL if condition == sp.true else NOTHING
    if isinstance(condition, sp.And):
        return both([_solve(c, splits) for c in condition.args])
    if isinstance(condition, sp.Or):
        return either([_solve(c, splits) for c in condition.args])
    if isinstance(condition, sp.core.relational.Relational) and condition.has(ex.k):
        return _relation(condition, splits)
    return Leaf(condition)


def _relation(relation: sp.Basic, splits: int) -> Node:
    e = relation.args[0] - relation.args[1]
    if e.has(sp.oo, sp.S.NegativeInfinity, sp.nan):
        return Leaf(relation)
    e = _integral(tidy(sp.expand(e)))
    cut = _condition(e)
    if cut is not None and splits:
        return _cases(relation, e, cut, splits - 1)
    if not e.is_integer:
        return Leaf(relation)
    e = digits(e)
    if not e.has(ex.k):
        return _solve(ex.canon(relation.func(e, 0)), splits)
    if isinstance(relation, (sp.Eq, sp.Ne)):
        if not _solvable(e):
            return _leaf(ex.canon(relation.func(e, 0)))
        if isinstance(relation, sp.Eq):
            return both([_inequality(e, False, splits), _inequality(-e, False, splits)])
        return either([_inequality(e, True, splits), _inequality(-e, True, splits)])
    return _inequality(e, isinstance(relation, sp.Gt), splits)


def _integral(e: sp.Expr) -> sp.Expr:
    """`e` times the common denominator of its coefficients."""
    coefficients = [t.as_coeff_Mul()[0] for t in sp.Add.make_args(e)]
    if not all(c.is_Rational for c in coefficients):
        return e
    return sp.expand(e * reduce(sp.ilcm, [c.q for c in coefficients], 1))


def _condition(e: sp.Expr) -> Boolean | None:
    """The condition of a `Where` over keys that stands outside of any load."""
    stack = list(e.args)
    while stack:
        node = stack.pop()
        if isinstance(node, ex.Where) and node.has(ex.k):
            return node.args[0]
        if not isinstance(node, ex.Load):
            stack.extend(node.args)
    return None


def _cases(relation: sp.Basic, e: sp.Expr, cut: Boolean, splits: int) -> Node:
    def case(pick: int) -> Boolean:
        chosen = {w: w.args[pick] for w in e.atoms(ex.Where) if w.args[0] == cut}
        return ex.canon(relation.func(e.xreplace(chosen), 0))

    yes, no = both([_solve(cut, splits), _solve(case(1), splits)]), _solve(case(2), splits)
    return either([yes, both([_solve(ex.canon(sp.Not(cut)), splits), no])])


def _keyed(e: sp.Expr) -> list[tuple[sp.Expr, sp.Expr]]:
    return [t.as_coeff_Mul() for t in sp.Add.make_args(e) if t.has(ex.k)]


def _solvable(e: sp.Expr) -> bool:
    """Whether both `e >= 0` and `e <= 0` are bounds on k."""
    terms = _keyed(e)
    kinds = (sp.Abs, ex.Maximum, ex.Minimum)
    if any(isinstance(part, kinds) for _, part in terms):
        return True
    return all(part == ex.k for _, part in terms) or (
        len(terms) == 1 and isinstance(terms[0][1], ex.FloorDiv) and _solvable(terms[0][1].args[0])
    )


def _inequality(e: sp.Expr, strict: bool, splits: int) -> Node:
    """`e >= 0`, or `e > 0`, for an integer `e` with k."""
    terms = _keyed(e)
    for c, part in terms:
        if isinstance(part, (sp.Abs, ex.Maximum, ex.Minimum)) and splits:
            options = (part.args[0], -part.args[0]) if isinstance(part, sp.Abs) else part.args
            join = both if (c > 0) == isinstance(part, ex.Minimum) else either
            return join([_again(sp.expand(e - c * part + c * o), strict, splits - 1) for o in options])
    rest = e - sum((c * part for c, part in terms), sp.S.Zero)
    if all(part == ex.k for _, part in terms):
        a = sum(c for c, _ in terms)
        return _bound(a, rest, strict)
    if len(terms) == 1 and isinstance(terms[0][1], ex.FloorDiv):
        c, (x, w) = terms[0][0], terms[0][1].args
        if w.is_Integer and w > 0:
            return _unfloor(c, x, w, rest, strict, splits)
    return _leaf(ex.canon(sp.Gt(e, 0) if strict else sp.Ge(e, 0)))


def _leaf(relation: Boolean) -> Node:
    """A comparison of integers with zero, unless its sign is always the same."""
    if relation in (sp.true, sp.false):
        return ALL if relation == sp.true else NOTHING
    e, strict = relation.args[0], isinstance(relation, (sp.Eq, sp.Ne, sp.Gt))
    above, below = nonnegative(e - 1 if strict else e), nonnegative(-e if isinstance(relation, sp.Gt) else -e - 1)
    if isinstance(relation, (sp.Eq, sp.Ne)):
        always, never = (
            isinstance(relation, sp.Ne) and (above or below),
            isinstance(relation, sp.Eq) and (above or below),
        )
    else:
        always, never = above, below
    return ALL if always else NOTHING if never else Leaf(relation)


def _again(e: sp.Expr, strict: bool, splits: int) -> Node:
    if e.has(ex.k):
        return _inequality(digits(e), strict, splits)
    return _solve(ex.canon(sp.Gt(e, 0) if strict else sp.Ge(e, 0)), splits)


def _unfloor(c: sp.Expr, x: sp.Expr, w: sp.Expr, rest: sp.Expr, strict: bool, splits: int) -> Node:
    """`c*(x//w) + rest >= 0` as a comparison of x."""
    if c > 0:  # x//w >= t is x >= w*t
        least = quotient(-rest, c) + 1 if strict else quotient(c - 1 - rest, c)
        return _again(sp.expand(x - w * least), False, splits)
    most = quotient(rest - c - 1, -c) if strict else quotient(rest, -c) + 1  # x//w < t is x < w*t
    return _again(sp.expand(w * most - x), True, splits)


def _bound(a: sp.Expr, rest: sp.Expr, strict: bool) -> Node:
    """`a*k + rest >= 0` (or `> 0`) with a number a."""
    if a > 0:
        return _from(sp.expand(quotient(-rest, a) + 1 if strict else quotient(a - 1 - rest, a)))
    return _below(sp.expand(quotient(rest - a - 1, -a) if strict else quotient(rest, -a) + 1))


def _from(lo: sp.Expr) -> Node:
    if nonnegative(-lo):
        return ALL
    if nonnegative(lo - ex.n_k):
        return NOTHING
    parts = apart(lo, ex.Maximum)
    return From(lo) if parts is None else both(map(_from, parts))


def _below(hi: sp.Expr) -> Node:
    if nonnegative(hi - ex.n_k):
        return ALL
    if nonnegative(-hi):
        return NOTHING
    parts = apart(hi, ex.Minimum)
    return Below(hi) if parts is None else both(map(_below, parts))


def apart(end: sp.Expr, kind: type) -> list[sp.Expr] | None:
    """The ends of which `end` is the greatest (`Maximum`) or the least (`Minimum`); None if it is of another form."""
    for term in sp.Add.make_args(end):
        c, part = term.as_coeff_Mul()
        flipped = {ex.Maximum: ex.Minimum, ex.Minimum: ex.Maximum}.get(part.func)
        if flipped is not None and c.is_Integer and (part.func if c > 0 else flipped) is kind:
            return [sp.expand(end - term + c * a) for a in part.args]
    return None
