"""Clauses of a mask that are one value for a whole block: `map[b, h, q // rows, k // keys] != 0`. Free of torch.

They say more than an interval could: each entry of the map is known. `rest` is what interval arithmetic has to class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex


@dataclass(frozen=True)
class Coarse:
    """One clause: `condition` holds or not for all of `rows` queries by `keys` keys from a multiple of them on."""

    condition: Boolean
    rows: int
    keys: int


@lru_cache(maxsize=1024)
def coarse(keep: Boolean) -> tuple[tuple[Coarse, ...], Boolean]:
    """The clauses of `keep` that are constant on blocks of queries and keys, and the conjunction of all others."""
    found, rest = [], []
    for clause in ex.conjuncts(ex.canon(keep)):
        one = _coarse(clause)
        rest.append(clause) if one is None else found.append(one)
    return tuple(found), sp.And(*rest)


def _coarse(clause: Boolean) -> Coarse | None:
    """Of clauses with a load, on queries and keys both: others have tables or ends of their own."""
    steps = [_step(clause, symbol) for symbol in (ex.q, ex.k)]
    if None in steps or not clause.has(ex.Load) or not (ex.depends(clause, ex.q) and ex.depends(clause, ex.k)):
        return None
    rows, keys = steps
    return Coarse(clause, rows or 1, keys or 1) if (keys or 1) > 1 else None


def _step(clause: Boolean, symbol: sp.Symbol) -> int | None:
    """The divisor c if the symbol occurs in `symbol // c` alone, with one c; 1 if it stands anywhere by itself."""
    divisors = {
        int(node.args[1]) if node.args[0] == symbol and node.args[1].is_Integer and node.args[1] > 0 else None
        for node in clause.atoms(ex.FloorDiv)
        if ex.depends(node, symbol)
    }
    if None in divisors or len(divisors) > 1:
        return None
    bare = clause.xreplace({node: sp.S.Zero for node in clause.atoms(ex.FloorDiv)})
    return 1 if ex.depends(bare, symbol) or not divisors else divisors.pop()
