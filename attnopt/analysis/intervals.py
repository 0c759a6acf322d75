"""Interval arithmetic over expressions, with symbolic ends (for generated code) or arrays (for block maps).

Arrays are numpy's, or whatever an `Algebra` computes with: `runtime.tables` has one for tensors of a device.

Sound, not tight: an interval holds every value that the expression takes in the box, and perhaps more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import sympy as sp

from attnopt import expr as ex

Ends = tuple[Any, Any]
Box = Mapping[sp.Basic, Ends]
"""Inclusive ends of symbols, and of any other expression whose range is known, such as a load."""


@dataclass(frozen=True)
class Algebra:
    """The operations on ends. `constant` turns a number, or a symbol outside the box, into an end or None.

    `both`, `either` and `no` are those on booleans; `places(size, step)` makes the integers `0, step..` below a size.
    """

    constant: Callable[[sp.Basic], Any]
    floordiv: Callable[[Any, Any], Any]
    mod: Callable[[Any, Any], Any]
    minimum: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]
    select: Callable[[Any, Any, Any], Any]
    equal: Callable[[Any, Any], Any]
    both: Callable[[Any, Any], Any] = np.logical_and
    either: Callable[[Any, Any], Any] = np.logical_or
    no: Callable[[Any], Any] = np.logical_not
    places: Callable[[int, int], Any] = lambda size, step: np.arange(0, size, step, dtype=np.int64)


SYMBOLIC = Algebra(
    lambda x: x, ex.FloorDiv, ex.Mod, ex.Minimum, ex.Maximum, ex.Where, lambda x, y: ex.canon(sp.Eq(x, y))
)


def number(x: sp.Basic) -> int | float | None:
    """A number as an end of arrays; None for anything else."""
    return (int(x) if x.is_Integer and abs(x) < 2**62 else float(x)) if x.is_number else None


NUMERIC = Algebra(
    number, np.floor_divide, np.mod, np.minimum, np.maximum, np.where, np.equal,
)  # fmt: skip


def interval(expr: sp.Basic, box: Box, algebra: Algebra) -> Ends | None:
    """Ends between which `expr` stays in the box, or None where the arithmetic cannot tell."""
    if expr in box:
        return box[expr]
    if isinstance(expr, sp.Symbol) or expr.is_number:
        end = algebra.constant(expr)
        return None if end is None else (end, end)
    if isinstance(expr, ex.Load):
        return None
    if isinstance(expr, sp.Mul):
        return _product(expr, box, algebra)
    if isinstance(expr, ex.Where):
        return _choice(expr, box, algebra)
    rule = _RULES.get(expr.func)
    if rule is None or (isinstance(expr, (ex.FloorDiv, ex.Mod)) and not _divides(expr.args[1])):
        return None
    args = [interval(a, box, algebra) for a in expr.args]
    return None if None in args else rule(algebra, *args)


def _divides(divisor: sp.Expr) -> bool:
    return bool(divisor.is_Integer) and divisor > 0


def _product(expr: sp.Mul, box: Box, algebra: Algebra) -> Ends | None:
    factor, rest = expr.as_coeff_Mul()
    if not factor.is_Integer or isinstance(rest, sp.Mul):
        return None
    ends = interval(rest, box, algebra)
    if ends is None:
        return None
    times = factor if algebra is SYMBOLIC else int(factor)
    low, high = (sp.expand(times * e) if isinstance(e, sp.Basic) else times * e for e in ends)
    return (low, high) if factor > 0 else (high, low)


def _choice(expr: ex.Where, box: Box, algebra: Algebra) -> Ends | None:
    """The branch that is taken where the box decides it, else what either may be."""
    condition, *branches = expr.args
    x, y = (interval(e, box, algebra) for e in branches)
    if x is None or y is None:
        return None
    low, high = algebra.minimum(x[0], y[0]), algebra.maximum(x[1], y[1])
    if algebra is SYMBOLIC:
        if condition.has(ex.Load) or any(condition.has(symbol) for symbol in box):
            return low, high
        return tuple(ex.Where(condition, *ends) for ends in zip(x, y, strict=True))  # type: ignore[return-value]
    possible, sure = decide(condition, box, algebra)
    never, select = algebra.no(possible), algebra.select
    return select(sure, x[0], select(never, y[0], low)), select(sure, x[1], select(never, y[1], high))


def _sum(algebra: Algebra, *args: Ends) -> Ends:
    lows, highs = zip(*args, strict=True)
    return sum(lows[1:], lows[0]), sum(highs[1:], highs[0])


def _floordiv(algebra: Algebra, x: Ends, y: Ends) -> Ends:
    return algebra.floordiv(x[0], y[0]), algebra.floordiv(x[1], y[0])


def _mod(algebra: Algebra, x: Ends, y: Ends) -> Ends:
    """The remainder's own interval where the dividend stays in one period, else all remainders."""
    period = y[0]
    one = algebra.equal(algebra.floordiv(x[0], period), algebra.floordiv(x[1], period))
    zero = sp.S.Zero if algebra is SYMBOLIC else 0
    last = period - 1
    return algebra.select(one, algebra.mod(x[0], period), zero), algebra.select(one, algebra.mod(x[1], period), last)


def _both_ends(name: str) -> Callable[..., Ends]:
    def rule(algebra: Algebra, *args: Ends) -> Ends:
        lows, highs = zip(*args, strict=True)
        return reduce(getattr(algebra, name), lows), reduce(getattr(algebra, name), highs)

    return rule


def _abs(algebra: Algebra, x: Ends) -> Ends:
    zero = sp.S.Zero if algebra is SYMBOLIC else 0
    return algebra.maximum(zero, algebra.maximum(x[0], -x[1])), algebra.maximum(x[1], -x[0])


_RULES: dict[type, Callable[..., Ends]] = {
    sp.Add: _sum,
    ex.FloorDiv: _floordiv,
    ex.Mod: _mod,
    ex.Maximum: _both_ends("maximum"),
    ex.Minimum: _both_ends("minimum"),
    sp.Abs: _abs,
}


def decide(condition: sp.Basic, box: Box, algebra: Algebra = NUMERIC) -> tuple[Any, Any]:
    """`(possible, sure)` of a condition in a box of numbers: booleans, or arrays. Unknown is `(True, False)`."""
    if condition in box:
        return box[condition]
    if condition in (sp.true, sp.false):
        return bool(condition), bool(condition)
    if isinstance(condition, sp.Not):
        possible, sure = decide(condition.args[0], box, algebra)
        return algebra.no(sure), algebra.no(possible)
    if isinstance(condition, (sp.And, sp.Or)):
        join = algebra.both if isinstance(condition, sp.And) else algebra.either
        parts = [decide(c, box, algebra) for c in condition.args]
        return reduce(join, [p for p, _ in parts]), reduce(join, [s for _, s in parts])
    if isinstance(condition, sp.core.relational.Relational):
        ends = interval(sp.expand(condition.args[0] - condition.args[1]), box, algebra)
        return _compare(condition, ends, algebra)
    return True, False


def _compare(relation: sp.Basic, ends: Ends | None, algebra: Algebra) -> tuple[Any, Any]:
    if ends is None:
        return True, False
    low, high = ends
    no = algebra.no
    zero, apart = algebra.both(low == 0, high == 0), algebra.either(low > 0, high < 0)
    # An end may be NaN (inf - inf): every comparison with it is false, which must read as "possible" and "not sure".
    rows: dict[type, tuple[Any, Any]] = {
        sp.Ge: (no(high < 0), low >= 0),
        sp.Gt: (no(high <= 0), low > 0),
        sp.Le: (no(low > 0), high <= 0),
        sp.Lt: (no(low >= 0), high < 0),
        sp.Eq: (no(apart), zero),
        sp.Ne: (no(zero), apart),
    }
    return rows[relation.func]
