"""What the mask of a spec is: derived from `keep`, as data and in words. Free of torch.

`keep` is first solved for the key (`solve`), by equivalences only; then bounds and conditions get names. A name is
given where the bound *is* that expression, so what is said holds; what has no name is said as its formula.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any as Anything

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.analysis import joins as jn
from attnopt.analysis import parts as pt
from attnopt.analysis.digits import remainders
from attnopt.analysis.grid import Array, Grid
from attnopt.analysis.solution import Below, Both, Either, From, Leaf, Node, both, either
from attnopt.analysis.solve import apart, solve
from attnopt.readable import show
from attnopt.spec import AttentionSpec

_ORDER = (
    pt.Band, pt.Span, pt.Blocks, pt.Neighbourhood, pt.Phase, pt.Columns, jn.Compare, jn.Row, jn.Queries, jn.Any, jn.All,
    jn.Not, jn.Dense, jn.Formula,
)  # fmt: skip
# A score that is lower by this weighs nothing beside others in single precision: exp(-64) is 2e-28.
_LOW = -64
# Of so many bounds in a disjunction at most, those that leave a hole between them are looked for.
_HOLES = 8


@dataclass(frozen=True)
class Mask:
    """A mask by its meaning. `str` says it in words.

    Attributes:
        part: what is kept; `parts.All(())` where every key is.
    """

    part: pt.Part

    @property
    def parts(self) -> tuple[pt.Part, ...]:
        """The conditions that must all hold."""
        return self.part.parts if isinstance(self.part, jn.All) else (self.part,)

    def dense(self, grid: Grid) -> Array:
        """Booleans of the grid's shape, evaluated from the parts alone."""
        return self.part.dense(grid)

    def __str__(self) -> str:
        return str(self.part)


@lru_cache(maxsize=1024)
def derive(keep: Boolean) -> Mask:
    """The mask that `keep` is."""
    return Mask(_part(solve(keep)))


def describe(spec: AttentionSpec) -> str:
    """The mask of a spec in words: `causal (top-left), and not padding (mask[b, k])`; of a sum, each once.

    A finite fill that stays in the score is told apart: `causal (top-left), as -65504 in the score`.
    """
    return "; and ".join(dict.fromkeys(words for term in spec.terms for words in _words(term)))


def _words(spec: AttentionSpec) -> list[str]:
    soft = [f"{derive(ex.canon(kept))}, as {show(fill)} in the score" for kept, fill in _fills(spec.score)]
    return soft if soft and spec.keep == sp.true else [str(derive(spec.keep)), *soft]


def _fills(score: sp.Expr) -> list[tuple[Boolean, sp.Expr]]:
    """The masks that a score holds as a low number on what they drop: what they keep, and the number."""
    found = []
    for term in sp.Add.make_args(score):
        if isinstance(term, ex.Where):
            c, *branches = term.args
            kept, dropped = (x.as_coeff_Add()[0] for x in branches)
            if dropped.is_finite and dropped <= _LOW < kept:
                found.append((c, dropped))
            elif kept.is_finite and kept <= _LOW < dropped:
                found.append((sp.Not(c), kept))
    return found


def _part(node: Node) -> pt.Part:
    if isinstance(node, Either):
        return _either(node)
    nodes = _opened(node.parts if isinstance(node, Both) else (node,))
    lows = [n.lo for n in nodes if isinstance(n, From)]
    highs = [n.hi for n in nodes if isinstance(n, Below)]
    found = [*_bounds(lows, highs), *_conditions([n.condition for n in nodes if isinstance(n, Leaf)])]
    found += [_part(n) for n in nodes if isinstance(n, (Both, Either))]
    found = _neighbourhood(found)
    found.sort(key=lambda p: (_ORDER.index(type(p)), str(p)))
    return found[0] if len(found) == 1 else jn.All(tuple(found))


def _opened(nodes: tuple[Node, ...]) -> list[Node]:
    """`k <= max(q, 4)` as `k <= q or k <= 4`; not where both ends of a range are made so, as in a clamped window."""
    made = [n.lo if isinstance(n, From) else n.hi for n in nodes if isinstance(n, (From, Below))]
    if sum(end.has(ex.Maximum, ex.Minimum) for end in made) != 1:
        return list(nodes)
    return [_wide(n) or n if isinstance(n, (From, Below)) else n for n in nodes]


def _wide(node: From | Below) -> Node | None:
    """The disjunction that a bound is which the wider of two plain ends makes."""
    end, kind = (node.lo, ex.Minimum) if isinstance(node, From) else (node.hi, ex.Maximum)
    ends = apart(end, kind)
    if ends is None or any(e.has(ex.Maximum, ex.Minimum) for e in ends):
        return None
    return either([type(node)(e) for e in ends])


def _either(node: Either) -> pt.Part:
    rest, found = list(node.parts), list[pt.Part]()
    for low in [n for n in rest if isinstance(n, From)][:_HOLES]:
        high = next((n for n in rest if isinstance(n, Below) and sp.expand(low.lo - n.hi).is_positive), None)
        if high is not None:  # k < x or y <= k: all but x <= k < y
            rest = [n for n in rest if n not in (low, high)]
            found.append(jn.Not(_part(both([From(high.hi), Below(low.lo)]))))
    found += [_part(n) for n in rest]
    found.sort(key=lambda p: (_ORDER.index(type(p)), str(p)))
    return found[0] if len(found) == 1 else jn.Any(tuple(found))


# --- bounds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _End:
    """A bound `scale * ((q + offset)//width) + rest`, or one of another form: then `scale` is None."""

    bound: sp.Expr
    scale: sp.Expr | None
    width: sp.Expr = sp.S.One
    offset: sp.Expr = sp.S.Zero
    rest: sp.Expr = sp.S.Zero

    @property
    def form(self) -> tuple[Anything, ...]:
        return (self.scale, self.width, self.offset)


def _end(bound: sp.Expr) -> _End:
    terms = [t for t in sp.Add.make_args(sp.expand(bound)) if ex.depends(t, ex.q)]
    if not terms:
        return _End(bound, sp.S.Zero, rest=bound)
    scale, part = terms[0].as_coeff_Mul()
    if len(terms) > 1 or not (scale.is_Integer and scale > 0):
        return _End(bound, None)
    rest = sp.expand(bound - terms[0])
    if part == ex.q:
        return _End(bound, scale, rest=rest)
    if isinstance(part, ex.FloorDiv) and part.args[1].is_Integer and part.args[1] > 0:
        offset = sp.expand(part.args[0] - ex.q)
        if not ex.depends(offset, ex.q):
            return _End(bound, scale, part.args[1], offset, rest)
    return _End(bound, None)


def _bounds(lows: list[sp.Expr], highs: list[sp.Expr]) -> list[pt.Part]:
    """Every lower and every upper bound by name; those that belong together as one."""
    found, waiting = [], [_end(hi) for hi in highs]
    for low in [_end(lo) for lo in lows]:
        pairs = ((high, _named(low, high)) for high in waiting if high.form == low.form)
        high, part = next(((high, part) for high, part in pairs if part is not None), (None, None))
        if high is not None:
            waiting.remove(high)
        found.append(part or _named(low, None))
    return [p for p in [*found, *(_named(None, high) for high in waiting)] if p is not None]


def _named(low: _End | None, high: _End | None) -> pt.Part | None:
    end: _End = low or high  # type: ignore[assignment]
    if end.scale is None or end.scale == 0:
        return pt.Span(low and low.bound, high and high.bound)
    if end.scale == 1 and end.width == 1:
        return _band(low, high)
    return _blocks(low, high)


def _band(low: _End | None, high: _End | None) -> pt.Part | None:
    if low is None and high is not None:
        return pt.Band(high.rest - 1, None, sp.S.Zero)
    assert low is not None
    constant, symbolic = low.rest.as_coeff_Add()
    if high is None:
        ahead = constant > 0
        return pt.Band(low.rest if ahead else symbolic, sp.S.Zero if ahead else -constant, None)
    last, offset = high.rest.as_coeff_Add()
    left = sp.expand(offset - low.rest)
    if symbolic != offset and left.has(*ex.SIZES):
        return None
    return pt.Band(offset, left, last - 1)


def _blocks(low: _End | None, high: _End | None) -> pt.Part | None:
    end: _End = low or high  # type: ignore[assignment]
    m = end.scale
    constant, symbolic = end.rest.as_coeff_Add()
    key_offset = sp.Mod(-constant, m) - symbolic
    back = None if low is None else sp.expand(-(low.rest + key_offset) / m)
    ahead = None if high is None else sp.expand((high.rest + key_offset) / m) - 1
    if not all(e is None or e.is_Integer for e in (back, ahead)):
        return None
    return pt.Blocks(end.width, m, end.offset, key_offset, back, ahead)


# --- conditions ------------------------------------------------------------------------------------

_OPS = {sp.Eq: "==", sp.Ne: "!=", sp.Ge: ">=", sp.Gt: ">"}
_FLIPPED = {"==": "==", "!=": "!=", ">=": "<=", ">": "<"}


def _conditions(conditions: list[Boolean]) -> list[pt.Part]:
    """Every condition by name; several limits of one digit are one part."""
    found: list[pt.Part] = []
    for part in map(_condition, conditions):
        same = next((p for p in found if isinstance(p, pt.Columns) and _joins(p, part)), None)
        if same is None:
            found.append(part)
        else:
            found[found.index(same)] = replace(same, **{n: e for n, e in _limits(part).items() if e is not None})
    return found


def _limits(part: Anything) -> dict[str, sp.Expr | None]:
    return {"left": part.left, "right": part.right}


def _joins(known: pt.Columns, part: pt.Part) -> bool:
    if not isinstance(part, pt.Columns) or (known.width, known.unit) != (part.width, part.unit):
        return False
    return all(x is None or y is None for x, y in zip(_limits(known).values(), _limits(part).values(), strict=True))


def _condition(condition: Boolean) -> pt.Part:
    if not ex.depends(condition, ex.k):
        return jn.Queries(condition)
    if not condition.has(ex.Load):
        return remainders(condition) or jn.Formula(condition)
    if not ex.depends(condition, ex.q):
        return jn.Row(condition)
    sides = _sides(condition)
    if sides is not None:
        return jn.Compare(*sides)
    pairs = [load for load in ex.loads(condition) if ex.depends(load, ex.q) and ex.depends(load, ex.k)]
    return jn.Dense(condition) if pairs else jn.Formula(condition)


def _sides(condition: Boolean) -> tuple[str, sp.Expr, sp.Expr] | None:
    """`(op, query, key)` of a comparison that keeps queries and keys apart: `key op query`."""
    op = _OPS.get(condition.func)
    if op is None or condition.args[1] != 0:
        return None
    terms = sp.Add.make_args(condition.args[0])
    key = sp.Add(*[t for t in terms if ex.depends(t, ex.k)])
    query = sp.Add(*[-t for t in terms if not ex.depends(t, ex.k)])
    if ex.depends(key, ex.q):
        return None
    if key.could_extract_minus_sign() or (
        isinstance(key, sp.Add) and all(t.could_extract_minus_sign() for t in key.args)
    ):
        return _FLIPPED[op], -query, -key
    return op, query, key


def _neighbourhood(found: list[pt.Part]) -> list[pt.Part]:
    """`Blocks` of rows and `Columns` that divide them, down to single keys, as one box."""
    columns = sorted((p for p in found if isinstance(p, pt.Columns)), key=lambda p: -int(p.unit))
    for rows in [p for p in found if isinstance(p, pt.Blocks)]:
        axes: list[pt.Blocks | pt.Columns] = [rows]
        size = rows.width
        for column in columns:
            if column.unit * column.width == size:
                axes, size = [*axes, column], column.unit
        plain = rows.width == rows.key_width and rows.offset == rows.key_offset == 0
        if plain and len(axes) > 1 and size == 1:
            return [*(p for p in found if p not in axes), pt.Neighbourhood(tuple(axes))]
    return found
