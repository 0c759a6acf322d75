"""Conditions on remainders by name: strided and dilated masks, and the columns of a grid. Free of torch."""

from __future__ import annotations

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis import parts as pt


def remainders(condition: Boolean) -> pt.Part | None:
    """The part that a comparison of remainders is, or None where it has no name."""
    if not isinstance(condition, sp.core.relational.Relational) or condition.args[1] != 0:
        return None
    terms = [t.as_coeff_Mul() for t in sp.Add.make_args(condition.args[0]) if not t.is_number]
    constant = condition.args[0] - sum((c * part for c, part in terms), sp.S.Zero)
    if not all(isinstance(part, ex.Mod) and part.args[1].is_Integer and abs(c) == 1 for c, part in terms):
        return None
    if len(terms) == 1:
        (c, part), step = terms[0], terms[0][1].args[1]
        kept = _kept(condition.func, c, constant, step)
        return None if kept is None else _phase(part.args[0], step, *kept)
    if len(terms) != 2 or terms[0][0] != -terms[1][0] or terms[0][1].args[1] != terms[1][1].args[1]:
        return None
    (c, key), (_, query) = terms if terms[0][1].has(ex.k) else terms[::-1]
    if isinstance(condition, (sp.Eq, sp.Ne)) and constant == 0:
        step = key.args[1]
        count = (sp.S.Zero, sp.S.One) if isinstance(condition, sp.Eq) else (sp.S.One, step - 1)
        return _phase(key.args[0] - query.args[0], step, *count)
    return _columns(condition.func, c, key, query, constant)


def _kept(relation: type, c: sp.Expr, constant: sp.Expr, step: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
    """First remainder and number of remainders for which `c*remainder + constant` is as the relation says."""
    holds = [bool(relation(c * r + constant, 0)) for r in range(int(step))] if step <= 1 << 12 else []
    # One run of remainders, which may pass the end and go on at zero.
    starts = [r for r in range(len(holds)) if holds[r] and not holds[r - 1]]
    return (sp.Integer(starts[0]), sp.Integer(sum(holds))) if len(starts) == 1 else None


def _phase(place: sp.Expr, step: sp.Expr, first: sp.Expr, count: sp.Expr) -> pt.Part | None:
    """`(place - first) % step < count` with place `±k`, or `±(k - q)`, and an offset."""
    place = sp.expand(place)
    a, c = place.coeff(ex.k, 1), place.coeff(ex.q, 1)
    offset = sp.expand(place - a * ex.k - c * ex.q)
    if abs(a) != 1 or ex.depends(offset, ex.k, ex.q):
        return None
    if step == 2 and abs(c) == 1:
        c = -a  # of two, sum and difference have the same remainder
    if c not in (0, -a):
        return None
    offset -= first
    if a == -1:  # (-x) % m is m - 1 - (x - 1) % m, so a run of remainders stays one
        offset = -offset + count - 1
    constant, symbolic = sp.expand(offset).as_coeff_Add()
    return pt.Phase(step, symbolic + sp.Mod(constant, step), count, c != 0)


def _columns(relation: type, c: sp.Expr, key: sp.Expr, query: sp.Expr, constant: sp.Expr) -> pt.Part | None:
    """`c*(K - Q) + constant >= 0` (or `== 0`) of one digit of k and q."""
    (place, width), unit = key.args, sp.S.One
    if isinstance(place, ex.FloorDiv):
        place, unit = place.args
    if place != ex.k or query.xreplace({ex.q: ex.k}) != key or not unit.is_Integer or not constant.is_Integer:
        return None
    if relation is sp.Eq:
        return pt.Columns(width, unit, c * constant, -c * constant)
    if relation is not sp.Ge:
        return None
    return pt.Columns(width, unit, None, constant) if c == -1 else pt.Columns(width, unit, constant, None)
