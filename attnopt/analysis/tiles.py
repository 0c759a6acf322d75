"""Which keys a tile of queries can keep, derived from `keep` by interval arithmetic. Free of torch.

All results are sound: where the arithmetic cannot tell, a range of possible keys is too wide and a range of
surely kept keys is too narrow, never the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.spec import AttentionSpec

# The query tile is [q0, q1).
q0, q1 = sp.symbols("q0 q1", integer=True, nonnegative=True)
_LAST = q1 - 1
_NONE = (sp.S.Zero, sp.S.Zero)


@dataclass(frozen=True)
class Bounds:
    """Key ranges of one query tile as integer expressions in `q0, q1`, `b, h`, sizes and scalars.

    Keys outside `[lo, hi)` are kept by no query of the tile; keys in `[full_lo, full_hi)` by every one of them.
    """

    lo: sp.Expr
    hi: sp.Expr
    full_lo: sp.Expr
    full_hi: sp.Expr


@dataclass(frozen=True)
class Tiles:
    """`keep` split into what coordinates decide (`static`) and what needs data (`residual`), with the key ranges.

    `bounds.lo/hi` respect both parts; `bounds.full_lo/full_hi` speak of the static part alone.
    """

    bounds: Bounds
    static: Boolean
    residual: Boolean


def analyse(keep: Boolean) -> Tiles:
    """The split of a canonical `keep` and the key ranges of a query tile `[q0, q1)`."""
    clauses = list(ex.conjuncts(keep))
    static = [c for c in clauses if not c.has(ex.Load)]
    residual = [c for c in clauses if c.has(ex.Load)]
    sure = _all([_bounds(c) for c in static])
    possible = _all([_bounds(c) for c in clauses])
    bounds = Bounds(
        ex.Maximum(sp.S.Zero, possible.lo),
        ex.Minimum(ex.n_k, possible.hi),
        ex.Maximum(sp.S.Zero, sure.full_lo),
        ex.Minimum(ex.n_k, sure.full_hi),
    )
    return Tiles(bounds, sp.And(*static), sp.And(*residual))


def classify(
    spec: AttentionSpec,
    tile: tuple[int, int],
    keys: tuple[int, int],
    sizes: Mapping[sp.Symbol, int],
) -> str:
    """`full`, `partial` or `empty` for queries `[tile)` by `keys`; `sizes` gives every other symbol a number."""
    tiles = analyse(spec.canonical().keep)
    values = {**sizes, q0: tile[0], q1: tile[1]}
    lo, hi, full_lo, full_hi = (evaluate(e, values) for e in key_ranges(tiles.bounds))
    if min(keys[1], hi) <= max(keys[0], lo):
        return "empty"
    inside = full_lo <= keys[0] and keys[1] <= full_hi
    return "full" if inside and tiles.residual == sp.true else "partial"


def key_ranges(bounds: Bounds) -> tuple[sp.Expr, sp.Expr, sp.Expr, sp.Expr]:
    """The four ends in order: `lo, hi, full_lo, full_hi`."""
    return bounds.lo, bounds.hi, bounds.full_lo, bounds.full_hi


def evaluate(end: sp.Expr, values: Mapping[sp.Symbol, int]) -> int:
    """The number that an end of a range has at these values."""
    return int(end.xreplace({symbol: sp.Integer(value) for symbol, value in values.items()}).doit())


_ALL = Bounds(sp.S.Zero, ex.n_k, sp.S.Zero, ex.n_k)
_UNKNOWN = Bounds(sp.S.Zero, ex.n_k, *_NONE)
_EMPTY = Bounds(*_NONE, *_NONE)


def _bounds(clause: Boolean) -> Bounds:
    if clause == sp.true:
        return _ALL
    if clause == sp.false:
        return _EMPTY
    if isinstance(clause, sp.And):
        return _all([_bounds(c) for c in clause.args])
    if isinstance(clause, sp.Or):
        return reduce(_either, [_bounds(c) for c in clause.args])
    if isinstance(clause, sp.Ge) and clause.args[1] == 0:
        return _nonnegative(clause.args[0])
    if isinstance(clause, sp.Eq) and clause.args[1] == 0:
        e = clause.args[0]
        return _all([_nonnegative(e), _nonnegative(-e)])
    return _UNKNOWN


def _nonnegative(e: sp.Expr) -> Bounds:
    """Bounds of `e >= 0` for an integer `e = a*k + c*q + t` with numbers a and c."""
    e = sp.expand(e)
    a, c = e.coeff(ex.k, 1), e.coeff(ex.q, 1)
    t = e - a * ex.k - c * ex.q
    if not (e.is_integer and a.is_Integer and c.is_Integer) or t.has(ex.Load) or ex.depends(t, ex.k, ex.q, ex.s):
        return _UNKNOWN
    most, least = (t + c * _LAST, t + c * q0) if c > 0 else (t + c * q0, t + c * _LAST)
    if a > 0:  # k >= -rest/a, rounded up
        return Bounds(-ex.FloorDiv(most, a), ex.n_k, -ex.FloorDiv(least, a), ex.n_k)
    if a < 0:  # k <= rest/|a|, rounded down
        return Bounds(sp.S.Zero, ex.FloorDiv(most, -a) + 1, sp.S.Zero, ex.FloorDiv(least, -a) + 1)
    return Bounds(sp.S.Zero, _if_nonnegative(most), sp.S.Zero, _if_nonnegative(least))


def _if_nonnegative(e: sp.Expr) -> sp.Expr:
    return ex.Where(sp.Ge(e, 0), ex.n_k, sp.S.Zero)


def _all(parts: list[Bounds]) -> Bounds:
    """The intersection: every clause must hold."""
    los, his, full_los, full_his = zip(*map(key_ranges, [_ALL, *parts]), strict=True)
    return Bounds(
        _most(_but(los, 0)), _least(_but(his, ex.n_k)), _most(_but(full_los, 0)), _least(_but(full_his, ex.n_k))
    )


def _but(ends: tuple[sp.Expr, ...], neutral: sp.Expr | int) -> tuple[sp.Expr, ...]:
    """The ends without the one that `analyse` clamps to in any case, unless it is all there is."""
    return tuple(e for e in ends if e != neutral) or ends[:1]


def _either(x: Bounds, y: Bounds) -> Bounds:
    """The hull of what is possible; of what is sure, the union where it is one interval, else the longer one."""
    touch = sp.And(sp.Ge(y.full_hi - x.full_lo, 0), sp.Ge(x.full_hi - y.full_lo, 0))
    longer = sp.Ge((x.full_hi - x.full_lo) - (y.full_hi - y.full_lo), 0)
    return Bounds(
        _least((x.lo, y.lo)),
        _most((x.hi, y.hi)),
        ex.Where(touch, _least((x.full_lo, y.full_lo)), ex.Where(longer, x.full_lo, y.full_lo)),
        ex.Where(touch, _most((x.full_hi, y.full_hi)), ex.Where(longer, x.full_hi, y.full_hi)),
    )


def _most(ends: tuple[sp.Expr, ...]) -> sp.Expr:
    return reduce(ex.Maximum, dict.fromkeys(ends))


def _least(ends: tuple[sp.Expr, ...]) -> sp.Expr:
    return reduce(ex.Minimum, dict.fromkeys(ends))
