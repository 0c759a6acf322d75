"""What a softmax over columns computes, proven by following every element from the products to the output.

1. Forward: the weight in column t of the softmax's row multiplies the value of key K(q, t), at most once, or nothing.
2. Backward: the score there is the product of query q with key K(q, t), and what is added to it, or minus infinity;
   a score of no key is always minus infinity.
3. The kept pairs (q, K(q, t)) are all pairs of a band, each once, so that the sum over t is a sum over keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy as sp
from sympy.logic.boolalg import Boolean
from torch import fx

from attnopt import expr as ex
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.bands import band
from attnopt.patterns.contraction import contract, extent, is_contraction
from attnopt.patterns.coordinates import Axes, Coordinate, fit, places
from attnopt.patterns.enumerated import Case, Enumeration
from attnopt.patterns.grids import Array, Positions, Unproven, axis
from attnopt.patterns.lift import Lifter
from attnopt.patterns.traces import Piece, both
from attnopt.patterns.views import VIEWS, shape

_MOST_VIEWS = 6
_COLUMN = sp.Symbol("_column", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Read:
    """A node and the index at which it is read, in the symbols of the output's dimensions and in `k`."""

    node: fx.Node
    index: tuple[sp.Expr, ...]


@dataclass(frozen=True)
class Value:
    """An expression over marks (see `enumerated`), and where the nodes behind them are read."""

    expr: sp.Expr
    reads: tuple[tuple[fx.Node, Read], ...]


@dataclass(frozen=True)
class Proof:
    """The attention of `output`, whose dimensions `query` and `width` are those of queries and of features.

    `scores` and `weights` are values, whose marks that are not listed are `product` and the softmax. `symbols` are
    those of the output's dimensions.
    """

    output: fx.Node
    query: int
    width: int
    symbols: tuple[sp.Symbol, ...]
    scores: Value
    weights: Value
    product: fx.Node
    operands: tuple[Read, Read]
    value: Read
    keep: Boolean


def prove(softmax: fx.Node, applying: fx.Node, way: set[fx.Node], lifter: Lifter) -> tuple[Proof, frozenset[fx.Node]]:
    """The proof for the weights of `softmax` that `applying` applies, which lie on the `way`; and what it looked at.

    Raises `Unproven`.
    """
    site = _Site(softmax, applying, way, lifter)
    proof = site.proof()
    looked = [tracer.seen | tracer.constants.looked for tracer in site.tracers]
    views = {n for n in views_of(applying) if n <= proof.output}
    return proof, frozenset({*lifter.read, softmax, *way, *views}.union(*looked))


@dataclass(frozen=True)
class _Values:
    """What rows of the output sum: `keys[q, t]` is the key whose value column t of row q weighs, or -1.

    `row` is the index of the softmax's row, its column as None; `place` is where the values are read, and `dim` their
    dimension of positions.
    """

    output: fx.Node
    query: int
    width: int
    keys: Array
    place: Read
    dim: int
    row: tuple[sp.Expr | None, ...]
    weights: Sequence[Case]


class _Site:
    """One softmax, the contraction that applies its weights, and the nodes on the way to it."""

    def __init__(self, softmax: fx.Node, applying: fx.Node, way: set[fx.Node], lifter: Lifter) -> None:
        self.softmax, self.applying, self.way, self.lifter = softmax, applying, way, lifter
        self.dim = arguments(softmax)["dim"] % value(softmax).dim()
        self.values = Enumeration(lifter, (softmax,))
        self.tracers = [self.values.tracer]

    def proof(self) -> Proof:
        """The proof. Raises `Unproven`."""
        if any(not isinstance(n, int) for x in (self.softmax, self.applying) for n in value(x).shape):
            raise Unproven("sizes are not known when the graph is captured")
        for output in views_of(self.applying):
            found = self._values(output)
            if found is not None:
                return self._proof(found)
        raise Unproven("no dimension of the output is that of the queries")

    # --- from the softmax to the output ---

    def _values(self, output: fx.Node) -> _Values | None:
        """The values that the output's rows sum; None where queries have two dimensions or none."""
        axes = Axes(output, int(extent(self.applying)))
        index, node = tuple(c.at for c in axes.coordinates), output
        while node is not self.applying:
            node, index = self.values.tracer.lifter.step(node, index)  # type: ignore[misc]
        sides = contract(self.applying, index, axes.columns) or ()  # type: ignore[arg-type]
        mine = [side for side in sides if side[0] in self.way]
        other = [side for side in sides if side[0] not in self.way]
        if len(mine) != 1 or len(other) != 1:
            raise Unproven("the contraction that applies the weights has not one operand of weights and one of values")
        cases = [case for case in self.values.cases(*mine[0], axes.everywhere) if case.expr != 0]
        if not cases or any(self.softmax not in dict(case.marks) for case in cases):
            raise Unproven("weights are applied that do not come from the softmax")
        parts = self.values.tracer.pieces(*other[0], axes.union(case.holds for case in cases))
        read = [part for part in parts if part.number is None]
        if not np.isfinite([part.number for part in parts if part.number is not None]).all():
            raise Unproven("values are padded with numbers that are not finite")
        place = places(read, axes.coordinates, spare=1) if read else None
        if place is None:
            raise Unproven("the values are no tensor by batch, head, position and feature")
        dim = place[1].index(None)
        columns = [dict(case.marks)[self.softmax].index[self.dim] for case in cases]
        moving = {d for x in (place[2][dim], *columns) for d in range(axes.rank) if axes.moves(x, d)}
        used = axes.named(place[1])
        still = () if moving else axes.named(self._row(axes, axes.coordinates, cases)) - used
        if len(moving or still) != 1:
            return None
        (query,) = moving or still
        row = self._row(axes, axes.derived(query, self.softmax), cases)
        if row.count(None) != 1:
            raise Unproven("a row of weights is not one row of the softmax")
        rows = axes.named(row)
        if len(used - rows) != 1:
            return None
        keys = self._keys(axes, query, cases, parts, place[2][dim])
        at = Read(place[0], tuple(ex.k if x is None else x for x in place[1]))
        return _Values(output, query, *(used - rows), keys, at, dim, row, cases)

    def _row(self, axes: Axes, known: Sequence[Coordinate], cases: Sequence[Case]) -> tuple[sp.Expr | None, ...]:
        """The index of the softmax's row that a row of the output is; None for columns and for what is not known."""
        sizes, found = shape(self.softmax), set()
        for case in cases:
            index = enumerate(zip(dict(case.marks)[self.softmax].index, sizes, strict=True))
            found.add(tuple(None if d == self.dim else fit(x, case.holds, n, known) for d, (x, n) in index))
        (row, *more) = found
        return (None,) * len(row) if more else row

    def _keys(self, axes: Axes, query: int, cases: Sequence[Case], parts: Sequence[Piece], at: Any) -> Array:
        """The key of every row and column."""
        n_q, n_t = int(value(axes.output).shape[query]), int(value(self.softmax).shape[self.dim])
        keys, count = np.full(n_q * n_t, -1), np.zeros(n_q * n_t, dtype=int)
        for case in cases:
            column = axes.matrix(dict(case.marks)[self.softmax].index[self.dim], query)
            for part in parts:
                rows, columns = np.nonzero(axes.matrix(both(case.holds, part.holds), query))
                flat = rows * n_t + column[rows, columns]
                count += np.bincount(flat, minlength=n_q * n_t)
                if part.number is None:
                    keys[flat] = axes.matrix(at, query)[rows, columns]
        if count.max() > 1:
            raise Unproven("a weight is applied to two values")
        return keys.reshape(n_q, n_t)

    # --- from the products to the softmax ---

    def _proof(self, values: _Values) -> Proof:
        axes = Axes(values.output, values.keys.shape[1])
        derived, dropout = axes.derived(values.query, self.softmax), set(self.lifter.dropout)
        at = {c.expr: c.at for c in derived}
        index = tuple(axes.columns if x is None else at.get(x, x) for x in values.row)
        scored = Enumeration(self.lifter, ())
        self.tracers.append(scored.tracer)
        found = scored.cases(self.softmax.args[0], index, axes.everywhere)
        cases = [case for case in found if not _masked(case.expr)]
        if set(self.lifter.dropout) - dropout:
            raise Unproven("dropout acts on the scores")
        kept = axes.matrix(axes.union(case.holds for case in cases), values.query)
        if bool((kept & (values.keys < 0)).any()):
            raise Unproven("scores take part in the softmax whose weights meet no value")
        sizes = {int(n) for x in (self.softmax, self.applying) for n in value(x).shape}
        keep = band(kept, values.keys, int(shape(values.place.node)[values.dim]), sizes)
        known = [*derived, Coordinate(Positions(axes.spread(values.keys, values.query)), ex.k)]
        gap = (values.keys - np.arange(len(kept))[:, None] - np.arange(kept.shape[1]))[kept]
        if (gap == gap[0]).all():
            query = axes.coordinates[values.query].expr
            known.append(Coordinate(axes.columns, ex.k - query - int(gap[0])))
        scores, products = _alike(cases, "scores"), [n for n, _ in cases[0].marks if is_contraction(n)]
        if len(products) != 1 or scores.has(sp.oo, sp.nan, ex.NEG_INF):
            raise Unproven("not one contraction of queries and keys makes the scores")
        product = products[0]
        own = Axes(values.output, int(extent(self.applying))).derived(values.query, self.softmax)
        weights = Value(_alike(values.weights, "weights"), tuple(_reads(values.weights, own, self.softmax)))
        made = Value(scores, tuple(_reads(cases, known, product)))
        symbols = tuple(c.expr for c in axes.coordinates)
        operands = self._operands(axes, product, cases, known, symbols[values.query])
        return Proof(
            values.output, values.query, values.width, symbols, made, weights, product, operands, values.place,
            keep.xreplace({ex.q: symbols[values.query]}),
        )  # fmt: skip

    def _operands(
        self, axes: Axes, product: fx.Node, cases: Sequence[Case], known: Sequence[Coordinate], query: sp.Symbol
    ) -> tuple[Read, Read]:
        """Query and key of the product, the same at all places."""
        feature = Coordinate(axis(axes.rank + 1, int(extent(product)), axes.rank + 2), ex.d)
        parts: list[list[Piece]] = [[], []]
        for case in cases:
            index = dict(case.marks)[product].index
            for side, found in zip(contract(product, index, feature.at) or (), parts, strict=True):  # type: ignore[arg-type]
                found += self.values.tracer.pieces(*side, case.holds)
        roles = {}
        for pieces in parts:
            if any(piece.number is not None for piece in pieces):
                raise Unproven("scores of padded queries or keys take part in the softmax")
            place = places(pieces, [*known, feature])
            index = () if place is None else tuple(x for x in place[1] if x is not None)
            if place is not None and ex.d in index:
                roles[any(i.has(query) for i in index), any(i.has(ex.k) for i in index)] = Read(place[0], index)
        if set(roles) != {(True, False), (False, True)}:
            raise Unproven("a score is not the product of its own query and key")
        return roles[True, False], roles[False, True]


def _alike(cases: Sequence[Case], what: str) -> sp.Expr:
    (expr, *more) = {case.expr for case in cases}
    if more:
        raise Unproven(f"the {what} are not computed alike at all places that are not masked")
    return expr


def _reads(cases: Sequence[Case], known: Sequence[Coordinate], but: fx.Node) -> Iterator[tuple[fx.Node, Read]]:
    """Where the nodes behind the marks are read, the same in all cases."""
    for node in (node for node, _ in cases[0].marks if node is not but):
        place = places([replace(dict(case.marks)[node], holds=case.holds) for case in cases], known)
        if place is None:
            raise Unproven(f"{node} is not read at one place for a query and a key")
        yield node, Read(place[0], tuple(x for x in place[1] if x is not None))


def views_of(node: fx.Node) -> Iterator[fx.Node]:
    """The node and the views of it, one after another."""
    for _ in range(_MOST_VIEWS):
        yield node
        following = [u for u in node.users if op_name(u) in VIEWS and u.args[:1] == (node,)]
        if not following:
            return
        node = following[0]


def _masked(expr: sp.Expr) -> bool:
    """Whether a score is minus infinity: by itself, or since something finite is added to it."""
    if isinstance(expr, sp.Add):
        return any(_masked(x) for x in expr.args) and not expr.has(sp.oo, sp.nan)
    factor, rest = expr.as_coeff_Mul()
    return bool(expr == ex.NEG_INF or (factor.is_positive and factor.is_finite and factor != 1 and _masked(rest)))
