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
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL, tile_class
from attnopt.analysis.intervals import SYMBOLIC, interval
from attnopt.analysis.solution import Both, Either, From, Leaf, Node
from attnopt.analysis.solve import solve
from attnopt.spec import AttentionSpec

# The query tile is [q0, q1).
q0, q1 = sp.symbols("q0 q1", integer=True, nonnegative=True)
_LAST = q1 - 1
_NONE = (sp.S.Zero, sp.S.Zero)
_JOINED = 3
_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}


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
    sure = _all([_bounds(solve(c)) for c in static])
    possible = _all([_bounds(solve(c)) for c in clauses])
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
    if inside and tiles.residual == sp.true:
        return "full"
    return _NAMES[tile_class(spec.keep, tile, keys, sizes)]


def key_ranges(bounds: Bounds) -> tuple[sp.Expr, sp.Expr, sp.Expr, sp.Expr]:
    """The four ends in order: `lo, hi, full_lo, full_hi`."""
    return bounds.lo, bounds.hi, bounds.full_lo, bounds.full_hi


def evaluate(end: sp.Expr, values: Mapping[sp.Symbol, int]) -> int:
    """The number that an end of a range has at these values."""
    return int(end.xreplace({symbol: sp.Integer(value) for symbol, value in values.items()}).doit())


_ALL = Bounds(sp.S.Zero, ex.n_k, sp.S.Zero, ex.n_k)
_UNKNOWN = Bounds(sp.S.Zero, ex.n_k, *_NONE)
_EMPTY = Bounds(*_NONE, *_NONE)
_TILE = {ex.q: (q0, _LAST)}


def _bounds(node: Node) -> Bounds:
    if isinstance(node, Both):
        return _all([_bounds(n) for n in node.parts])
    if isinstance(node, Either):
        return _union([_bounds(n) for n in node.parts])
    if isinstance(node, Leaf):
        return _of_queries(node.condition)
    end = node.lo if isinstance(node, From) else node.hi
    ends = interval(end, _TILE, SYMBOLIC)
    if ends is None or not end.is_integer:
        return _UNKNOWN
    if isinstance(node, From):
        return Bounds(ends[0], ex.n_k, ends[1], ex.n_k)
    return Bounds(sp.S.Zero, ends[1], sp.S.Zero, ends[0])


def _of_queries(condition: Boolean) -> Bounds:
    """All keys or none, where the condition is on coordinates other than k."""
    if isinstance(condition, sp.Eq) and condition.args[1] == 0:
        e = condition.args[0]
        return _all([_of_queries(sp.Ge(x, 0, evaluate=False)) for x in (e, -e)])
    if not isinstance(condition, sp.Ge) or condition.args[1] != 0 or not condition.args[0].is_integer:
        return _UNKNOWN
    ends = None if ex.depends(condition, ex.k) else interval(condition.args[0], _TILE, SYMBOLIC)
    if ends is None:
        return _UNKNOWN
    return Bounds(sp.S.Zero, _if_nonnegative(ends[1]), sp.S.Zero, _if_nonnegative(ends[0]))


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


def _union(parts: list[Bounds]) -> Bounds:
    """What a disjunction bounds. The ends that are sure double with each part, so those of many are not joined."""
    if len(parts) <= _JOINED:
        return reduce(_either, parts) if parts else _EMPTY
    los, his, _, _ = zip(*map(key_ranges, parts), strict=True)
    return Bounds(_least(los), _most(his), parts[0].full_lo, parts[0].full_hi)


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
