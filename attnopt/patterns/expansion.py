"""Products of sums multiplied out, where the result is of a size that anybody could read."""

from __future__ import annotations

import math

import sympy as sp

LIMIT = 1024
"""Terms: of an attention's weights there are a handful; a normalisation that is iterated has millions."""


def expanded(expr: sp.Expr) -> sp.Expr | None:
    """The expression multiplied out; None where that would have more than `LIMIT` terms."""
    return sp.expand(expr) if _terms(expr) <= LIMIT else None


def _terms(expr: sp.Basic) -> float:
    """At most how many terms any sum has after multiplying out."""
    # Arguments come before what they are arguments of.
    counts: dict[sp.Basic, float] = {}
    for e in sp.postorder_traversal(expr):
        if e in counts:
            continue
        below = [counts[a] for a in e.args]
        if isinstance(e, sp.Add):
            counts[e] = sum(below)
        elif isinstance(e, sp.Mul):
            counts[e] = math.prod(below)
        elif isinstance(e, sp.Pow) and e.exp.is_Integer:
            counts[e] = counts[e.base] ** min(abs(int(e.exp)), LIMIT) if counts[e.base] <= LIMIT else math.inf
        else:
            counts[e] = 1
        if max([counts[e], *below]) > LIMIT:
            return math.inf
    return counts[expr]
