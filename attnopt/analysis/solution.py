"""A solved mask: bounds on the key and other conditions, joined. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis.intervals import SYMBOLIC, interval


@dataclass(frozen=True)
class From:
    """`lo <= k`; `lo` is free of k."""

    lo: sp.Expr


@dataclass(frozen=True)
class Below:
    """`k < hi`; `hi` is free of k."""

    hi: sp.Expr


@dataclass(frozen=True)
class Leaf:
    """A condition that is no bound on k: one on queries alone, on remainders, on data."""

    condition: Boolean


@dataclass(frozen=True)
class Both:
    """Every part holds; without parts: all keys."""

    parts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Either:
    """One part holds; without parts: no key."""

    parts: tuple[Node, ...] = ()


Node: TypeAlias = "From | Below | Leaf | Both | Either"
ALL, NOTHING = Both(), Either()
# Bounds are compared pair by pair while there are few; leaving that out costs words, never truth.
_PAIRS = 256


def both(parts: Iterable[Node]) -> Node:
    """The conjunction, without what other parts imply."""
    flat = dict.fromkeys(n for p in parts for n in (p.parts if isinstance(p, Both) else (p,)))
    if NOTHING in flat:
        return NOTHING
    lows = _tightest([n.lo for n in flat if isinstance(n, From)], ex.Maximum)
    highs = _tightest([n.hi for n in flat if isinstance(n, Below)], ex.Minimum)
    if len(lows) * len(highs) <= _PAIRS and any(nonnegative(lo - hi) for lo in lows for hi in highs):
        return NOTHING
    found: list[Node] = [*map(From, lows), *map(Below, highs)]
    found += [n for n in flat if not isinstance(n, (From, Below))]
    return found[0] if len(found) == 1 else Both(tuple(found))


def either(parts: Iterable[Node]) -> Node:
    """The disjunction, with what all parts share taken out of it."""
    flat = dict.fromkeys(n for p in parts for n in (p.parts if isinstance(p, Either) else (p,)))
    if ALL in flat:
        return ALL
    lows = _tightest([n.lo for n in flat if isinstance(n, From)], ex.Minimum)
    highs = _tightest([n.hi for n in flat if isinstance(n, Below)], ex.Maximum)
    if len(lows) * len(highs) <= _PAIRS and any(nonnegative(hi - lo) for lo in lows for hi in highs):
        return ALL
    found: list[Node] = [*map(From, lows), *map(Below, highs)]
    found += [n for n in flat if not isinstance(n, (From, Below))]
    if len(found) < 2:
        return found[0] if found else NOTHING
    sets = [set(n.parts) if isinstance(n, Both) else {n} for n in found]
    shared = [n for n in (found[0].parts if isinstance(found[0], Both) else found[:1]) if all(n in s for s in sets)]
    if not shared:
        return Either(tuple(found))
    rest = [both(m for m in (n.parts if isinstance(n, Both) else (n,)) if m not in shared) for n in found]
    return both([*shared, either(rest)])


def _tightest(ends: list[sp.Expr], op: type) -> list[sp.Expr]:
    """The ends without those that another one makes redundant by a constant."""
    found: dict[sp.Expr, sp.Expr] = {}
    for end in ends:
        constant, rest = sp.expand(end).as_coeff_Add()
        found[rest] = op(found[rest], constant) if rest in found else constant
    return [rest + constant for rest, constant in found.items()]


def nonnegative(e: sp.Expr) -> bool:
    """Whether `e` is surely not negative inside the extents of the coordinates."""
    e = sp.expand(e)
    if e.is_number:
        return bool(e >= 0)
    box = {c: (sp.S.Zero, n - 1) for c, n in zip(ex.COORDINATES, ex.SIZES, strict=True)}
    remainders = {m: (sp.S.Zero, m.args[1] - 1) for m in e.atoms(ex.Mod) if m.args[1].is_Integer and m.args[1] > 0}
    ends = interval(e, {**box, **remainders}, SYMBOLIC)
    return ends is not None and bool(sp.expand(ends[0]).is_nonnegative)
