"""Masks by data, and masks made of masks; `parts` holds those by position. Free of torch.

Only `Row`, `Queries`, `Dense` and `Formula` hold a condition: there the data, or the formula, is the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis.grid import Array, Grid
from attnopt.analysis.parts import Band, Blocks, Part, Span, keys
from attnopt.readable import show

_LONGEST = 200
_COMPARE = {
    "==": np.equal,
    "!=": np.not_equal,
    "<=": np.less_equal,
    "<": np.less,
    ">=": np.greater_equal,
    ">": np.greater,
}
_MEANING = {"==": "the same document", "!=": "another document"}


@dataclass(frozen=True)
class Compare(Part):
    """`key op query`, where data of the key (free of q) meets data of the query (free of k)."""

    op: str
    query: sp.Expr
    key: sp.Expr

    def dense(self, grid: Grid) -> Array:
        return np.broadcast_to(_COMPARE[self.op](grid.value(self.key), grid.value(self.query)), grid.shape)

    def __str__(self) -> str:
        sides = (self.query, self.key) if self.op in _MEANING else (self.key, self.query)
        both = self.query.has(ex.Load) and self.key.has(ex.Load)
        kind = _MEANING.get(self.op, "ordered by data") if both else "by data"
        return f"{kind} ({show(sides[0])} {self.op} {show(sides[1])})"


@dataclass(frozen=True)
class _Condition(Part):
    condition: Boolean

    def dense(self, grid: Grid) -> Array:
        return grid.dense(self.condition)

    def _shown(self) -> str:
        text = show(self.condition)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class Row(_Condition):
    """Data that decides about keys, the same for every query."""

    def __str__(self) -> str:
        return f"{'not padding' if ex.depends(self.condition, ex.b) else 'keys by data'} ({self._shown()})"


class Queries(_Condition):
    """A condition on the query, head or batch entry alone: such a row keeps all of its keys, or none."""

    def __str__(self) -> str:
        return f"only for {'queries' if ex.depends(self.condition, ex.q) else 'rows'} with {self._shown()}"


class Dense(_Condition):
    """Data for each pair of query and key."""

    def __str__(self) -> str:
        return f"arbitrary data ({self._shown()})"


class Formula(_Condition):
    """A condition that has no name."""

    def __str__(self) -> str:
        return f"arbitrary: {self._shown()}"


@dataclass(frozen=True)
class Not(Part):
    """Everything but the part."""

    part: Part

    def dense(self, grid: Grid) -> Array:
        return np.logical_not(self.part.dense(grid))

    def __str__(self) -> str:
        if self.part == Band(left=sp.S.Zero, right=sp.S.Zero):
            return "every position but the query's own"
        return f"not ({self.part})"


@dataclass(frozen=True)
class All(Part):
    """Every part holds; without parts: all keys."""

    parts: tuple[Part, ...] = ()

    @property
    def compound(self) -> bool:  # type: ignore[override]
        return len(self.parts) > 1

    def dense(self, grid: Grid) -> Array:
        found: Array = np.all([np.ones(grid.shape, bool), *(p.dense(grid) for p in self.parts)], axis=0)
        return found

    def __str__(self) -> str:
        if not self.parts:
            return "all keys"
        chunked = Band() in self.parts and any(isinstance(p, Blocks) and p.back == p.ahead == 0 for p in self.parts)
        words = [f"({p})" if isinstance(p, Any) and p.compound else str(p) for p in self.parts]
        return ("chunked causal: " if chunked else "") + ", and ".join(words)


@dataclass(frozen=True)
class Any(Part):
    """One part holds; without parts: no key."""

    parts: tuple[Part, ...] = ()

    @property
    def compound(self) -> bool:  # type: ignore[override]
        return len(self.parts) > 1

    def dense(self, grid: Grid) -> Array:
        found: Array = np.any([np.zeros(grid.shape, bool), *(p.dense(grid) for p in self.parts)], axis=0)
        return found

    def __str__(self) -> str:
        if not self.parts:
            return "no key"
        band = [p for p in self.parts if isinstance(p, Band) and p.left is None and p.right == 0]
        first = [p for p in self.parts if isinstance(p, Span) and p.lo is None and not ex.depends(p.hi, ex.q)]
        if len(self.parts) == 2 and len(band) == len(first) == 1:
            return f"prefix-LM: {band[0]}, or the first {keys(first[0].hi)}"
        return ", or ".join(f"({p})" if p.compound else str(p) for p in self.parts)
