"""Which queries and keys meet, as a condition: a band around the diagonal, a band of blocks, or both."""

from __future__ import annotations

import numpy as np
import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.patterns.grids import MOST, Array, Unproven


def band(kept: Array, keys: Array, n_k: int, blocks: set[int]) -> Boolean:
    """The condition on query and key that holds for exactly the kept pairs (q, `keys[q, t]`), each kept once.

    Raises `Unproven` where that is no band and no band of blocks of one of the given sizes.
    """
    q, k = np.nonzero(kept)[0], keys[kept]
    if not len(q) or _distinct(q * n_k + k, len(kept) * n_k) != len(q):
        raise Unproven("a key takes part twice in a row of the softmax" if len(q) else "no score is kept")
    low, high = int((k - q).min()), int((k - q).max())
    rows = np.arange(len(kept))
    near = [*([sp.Ge(ex.k - ex.q, low)] if low > 1 - len(kept) else []),
            *([sp.Le(ex.k - ex.q, high)] if high < n_k - 1 else [])]  # fmt: skip
    if _count(np.maximum(rows + low, 0), np.minimum(rows + high + 1, n_k)) == len(q):
        return sp.And(*near)
    for n in sorted(x for x in blocks if 1 < x < max(n_k, len(kept))):
        first, last = int((k // n - q // n).min()), int((k // n - q // n).max())
        start, stop = np.maximum((rows // n + first) * n, 0), np.minimum((rows // n + last + 1) * n, n_k)
        gap = ex.FloorDiv(ex.k, sp.Integer(n)) - ex.FloorDiv(ex.q, sp.Integer(n))
        whole = [sp.Eq(gap, 0)] if first == last == 0 else [sp.Ge(gap, first), sp.Le(gap, last)]
        if _count(start, stop) == len(q):
            return sp.And(*whole)
        if _count(np.maximum(start, rows + low), np.minimum(stop, rows + high + 1)) == len(q):
            return sp.And(*whole, *near)
    raise Unproven("the keys that take part are no band around the query")


def _count(start: Array, stop: Array) -> int:
    return int(np.maximum(stop - start, 0).sum())


def _distinct(pairs: Array, most: int) -> int:
    """How many different numbers below `most` there are."""
    if most > MOST * 16:
        return len(np.unique(pairs))
    seen = np.zeros(most, dtype=bool)
    seen[pairs] = True
    return int(np.count_nonzero(seen))
