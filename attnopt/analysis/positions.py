"""Where a query stands among the keys, as a mask says it, and one number a head as an expression. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex

# Larger than every length, and an int32 with what is added to it.
WHOLE = 1 << 30


def last_key(keep: Boolean) -> sp.Expr | None:
    """The last key of query q where a clause of `keep` is `k <= q + c` with c free of q, k and h; else None."""
    found = []
    for clause in ex.conjuncts(ex.canon(keep)):
        if not isinstance(clause, sp.Ge) or clause.args[1] != 0 or not clause.args[0].is_integer:
            continue
        last = sp.expand(clause.args[0] + ex.k)
        if not ex.depends(last, ex.k, ex.h, ex.n_h) and not ex.depends(sp.expand(last - ex.q), ex.q):
            found.append(last)
    return min(found, key=lambda e: (e.has(ex.Load), len(str(e)), str(e)), default=None)


def each_head(numbers: Sequence[int]) -> sp.Expr:
    """An expression in h that is `numbers[h]`: one test for every run of equal numbers."""
    made: sp.Expr = sp.Integer(numbers[-1])
    for head in range(len(numbers) - 1, 0, -1):
        if numbers[head] != numbers[head - 1]:
            made = ex.Where(ex.h < head, sp.Integer(numbers[head - 1]), made)
    return made


def windowed(own: sp.Expr, window: sp.Expr, sinks: int, causal: bool) -> Boolean:
    """Keys near position `own`, or among the first `sinks`.

    Causal: the last `window` keys up to `own`; else those at most `window // 2` away on either side.
    """
    if causal:
        near = sp.Ge(ex.k - own + window - 1, 0)
    else:
        reach = ex.FloorDiv(window, 2) if window.is_Integer else _halved(window)
        near = sp.And(sp.Ge(ex.k - own + reach, 0), sp.Ge(own - ex.k + reach, 0))
    return sp.Or(near, ex.k < sinks) if sinks else near


def _halved(window: sp.Expr) -> sp.Expr:
    """Half of a number a head, branch by branch."""
    if isinstance(window, ex.Where):
        return ex.Where(window.args[0], _halved(window.args[1]), _halved(window.args[2]))
    return sp.Integer(int(window) // 2)
