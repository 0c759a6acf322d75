"""Attention that the source has already made linear: `phi(q) @ (phi(k)^T @ v)`, or running sums where it is causal.

Feature maps stay outside. Evidence is asked for: a function on queries and keys, or the division by the row's sum;
without it this is a chain of products, and nothing is gained by calling it attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns import gates, rows
from attnopt.patterns.contraction import Side, contract, extent, factors, is_contraction, pair
from attnopt.patterns.gathers import trailing
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked
from attnopt.patterns.operands import Place, walk
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.pointwise import PRODUCTS, is_activation, leads, marks, terms
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.softmax import SOFTMAX, folded_heads
from attnopt.patterns.views import CASTS, VIEWS, Index, shape
from attnopt.region import Region
from attnopt.spec import EmptyRow, Pointwise

_CUMSUM = "aten::cumsum"
_SCALES = {*VIEWS, *CASTS, "aten::mul", "aten::div"}
# Functions that make features; an affine map alone makes none.
_FEATURES = {
    "aten::relu", "aten::elu", "aten::exp", "aten::sigmoid", "aten::softplus", "aten::silu", "aten::gelu", "aten::tanh",
    "aten::leaky_relu", "aten::square", "aten::pow", "aten::cos", "aten::sin", "aten::clamp", "aten::clamp_min",
    "aten::maximum", "aten::relu6", "aten::hardtanh", "aten::abs", *SOFTMAX,
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """The sides of a linear attention: `state` is the product of keys and values, `factor` a constant of it."""

    query: Side
    key: Side
    values: Side
    keep: Boolean
    factor: sp.Expr
    state: fx.Node


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The linear attention whose last product is `node`; None if it is none, or a mere chain of products."""
    for order, state in enumerate(terms(node)):
        if leads(state, {*PRODUCTS, _CUMSUM}, _SCALES) is None:
            continue
        fold = folded_heads(node) if value(node).dim() == 3 else None
        for heads in (fold, None) if fold is not None else (None,):
            found = _read(node, order, constants, heads)
            if found is not None:
                return found
    return None


def _read(node: fx.Node, order: int, constants: Mapping[str, torch.Tensor], fold: int | None) -> Region | None:
    at = marks(node)
    operands = pair(node, at, ex.d)
    if operands is None or not extent(node).is_Integer:
        return None
    state, query = operands if order == 0 else operands[::-1]
    wide = [i for i, m in enumerate(at) if m in state[1] and m not in query[1] and shape(node)[i] != 1]
    places = [i for i, m in enumerate(at) if m in query[1] and i not in wide and shape(node)[i] != 1]
    own = [i for i in places if at[i] not in state[1]]
    for query_dim in own if len(own) == 1 else places:
        if len(wide) != 1:
            return None
        framed = frame(node, query_dim, wide[0], shape(node)[query_dim], extent(node), fold)
        if isinstance(framed, Decline):
            continue
        lifter = Lifter(framed.sizes, constants)
        row = _pair(node, order, framed, lifter)
        if row is not None and _activations(framed, row):
            return _region(node, row, framed, lifter)
    return None


def _pair(node: fx.Node, order: int, framed: Frame, lifter: Lifter) -> _Pair | None:
    """The keys and values behind the state: a product over positions, or a running sum of outer products."""
    operands = pair(node, framed.index, ex.d)
    assert operands is not None
    state, query = operands if order == 0 else operands[::-1]
    for source, index, factor in walk(Place(*state, ex.d, width), lifter):
        keep: Boolean = sp.true
        if is_contraction(source) and not any(i.has(ex.q) for i in index):
            sides = contract(source, index, ex.k)
            framed.sizes.sizes[ex.k] = extent(source)
        elif op_name(source) == _CUMSUM:
            sides, keep = _outer(source, index), sp.Ge(ex.q - ex.k, 0)
        else:
            continue
        for key, values in (sides, sides[::-1]) if sides is not None else ():
            over = [any(i.has(c) for i in side[1]) for side in (key, values) for c in (ex.d, width, ex.k)]
            if over == [True, False, True, False, True, True]:
                return _Pair(query, key, values, keep, factor, source)
        return None
    return None


def _outer(node: fx.Node, index: Index) -> tuple[Side, Side] | None:
    """The two factors of the outer products that are summed up along the queries' own position."""
    a = arguments(node)
    place = a["dim"] % len(index)
    if index[place] != ex.q or any(i.has(ex.q) for n, i in enumerate(index) if n != place):
        return None
    at, source = (*index[:place], ex.k, *index[place + 1 :]), a["self"]
    letters = gates.letters(source)
    if letters is not None and len(letters[1]) == 2:
        known = dict(zip(letters[2], at, strict=True))
        left, right = (tuple(known[c] for c in names) for names in letters[0])
        return (letters[1][0], left), (letters[1][1], right)
    if op_name(source) != "aten::mul" or not all(isinstance(x, fx.Node) for x in source.args):
        return None
    left, right = (trailing(x, at) for x in source.args)
    return (source.args[0], left), (source.args[1], right)


def _activations(framed: Frame, row: _Pair) -> bool:
    entries = {b for b in framed.batch if framed.extent(b) != 1}
    for node, index in (row.key, row.values):
        if entries - {x for i in index for x in i.free_symbols} or not is_activation(node):
            return False
    return any(i.has(ex.q) for i in row.query[1])


def _region(node: fx.Node, row: _Pair, framed: Frame, lifter: Lifter) -> Region | None:
    factor = sp.Mul(*[ex.as_number(lifter.lift(*side)) for side in factors(node, framed.index)])
    totals = _totals(factor, row, lifter)
    if factor.has(width):
        return None
    parts = Parts(
        "linear", node, node, Masked(row.factor * ex.s, row.keep, EmptyRow.ZERO),
        Place(*row.query, ex.q, ex.d), Place(*row.key, ex.k, ex.d), Place(*row.values, ex.k, width),
        gate=sp.S.One if totals else factor, normalizer=Pointwise(1 / factor.xreplace(totals) if totals else sp.S.One),
    )  # fmt: skip
    maps = [_feature_map(side[0]) for side in (row.query, row.key)]
    region = build(parts, framed, lifter)
    if not isinstance(region, Region):
        return None
    divided = None if totals else _divided(region, row, framed)
    if divided is None and not totals and None in maps:
        return None
    found = divided or region
    return found.replace(claims=frozenset({row.state, *(m for m in maps if m is not None)}))


def _feature_map(node: fx.Node) -> fx.Node | None:
    """The function that made a node's features, behind views, constant factors and constant terms."""
    found = leads(node, _FEATURES, {*_SCALES, "aten::add", "aten::sub"})
    if found is None or found.op != "call_function":
        return None
    if op_name(found) in SOFTMAX and leads(found.args[0], PRODUCTS, {*POINTWISE, *VIEWS, *CASTS}):  # type: ignore[arg-type]
        return None  # weights of an attention of their own
    return found


# --- the division by the row's sum -----------------------------------------------------------------


def _divided(region: Region, row: _Pair, framed: Frame) -> Region | None:
    """The region with the division that follows it, if that is by the sum of the row's weights."""
    scaled = gates.following(region)
    if scaled is None:
        return None
    scaled.frame.sizes.sizes.update({ex.d: framed.extent(ex.d), ex.k: framed.extent(ex.k)})
    totals = _totals(scaled.factor, row, scaled.lifter)
    if not totals:
        return None
    return gates.absorb(region, replace(scaled, factor=1 / scaled.factor.xreplace(totals)), "divide")


def _totals(factor: sp.Expr, row: _Pair, lifter: Lifter) -> dict[sp.Basic, sp.Expr]:
    """The loads of sums of a row's weights, as multiples of `t`."""
    found = {load: _total(load, row, lifter) for load in factor.atoms(ex.Load)}
    return {load: total * ex.t / row.factor for load, total in found.items() if total is not None}


def _total(load: ex.Load, row: _Pair, lifter: Lifter) -> sp.Expr | None:
    """`c` where the load is `c` times the sum of a row's products of query and key."""
    node = lifter.nodes.get(load.args[0].name)
    inner = _over_features(node, load.args[1:], lifter) if isinstance(node, fx.Node) else None
    if inner is None:
        return None
    query = ex.as_number(lifter.lift(*row.query))
    key = ex.as_number(lifter.lift(*row.key))
    for part in inner.atoms(ex.Load):
        found = _over_keys(part, row, lifter)
        if found is None:
            continue
        factor, summand = found
        ratio = sp.cancel(inner / part / query * factor * (summand / key))
        if ratio.is_number:
            return ratio
    return None


def _over_features(node: fx.Node, index: Index, lifter: Lifter) -> sp.Expr | None:
    """What a sum over features sums."""
    if is_contraction(node):
        sides = contract(node, index, ex.d)
        return None if sides is None else sp.Mul(*[ex.as_number(lifter.lift(*side)) for side in sides])
    if op_name(node) != "aten::sum":
        return None
    found = rows.summed(node, index, lifter, ex.d)
    return None if found is None else found[0]


def _over_keys(load: ex.Load, row: _Pair, lifter: Lifter) -> tuple[sp.Expr, sp.Expr] | None:
    """Factor and summand at key `k` of a sum over the keys, running where the attention is causal."""
    node, index = lifter.nodes.get(load.args[0].name), load.args[1:]
    if not isinstance(node, fx.Node):
        return None
    if row.keep == sp.true:
        found = rows.summed(node, index, lifter) if op_name(node) in ("aten::sum", "aten::mean") else None
        return None if found is None else (found[1], found[0])
    if op_name(node) != _CUMSUM:
        return None
    place = arguments(node)["dim"] % len(index)
    if index[place] != ex.q:
        return None
    return sp.S.One, ex.as_number(lifter.lift(node.args[0], (*index[:place], ex.k, *index[place + 1 :])))
