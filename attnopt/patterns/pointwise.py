"""Attention without a softmax: a product of queries and keys, a pointwise chain, a product with the values.

What looks like it and is none: a multi-layer perceptron (its keys and values are parameters, or shared by the batch),
attention over channels (its product sums over positions), a plain chain of products (no function, mask or division).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.errors import Decline
from attnopt.graph import WEIGHT, op_name, value
from attnopt.patterns import rows
from attnopt.patterns.contraction import CONTRACTIONS, Side, contract, extent, factors, is_contraction, pair
from attnopt.patterns.dependence import LINEAR, Walk
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.memo import behind
from attnopt.patterns.operands import Place
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.softmax import folded_heads
from attnopt.patterns.views import CASTS, VIEWS, shape
from attnopt.region import Region

PRODUCTS = CONTRACTIONS - {"aten::linear", "aten::baddbmm", "aten::addmm", "aten::mm"}
_SCORES = {*PRODUCTS, "aten::baddbmm"}
_MAXIMA = {"aten::amax", "aten::max.dim"}
_BETWEEN = {
    *POINTWISE, *VIEWS, *CASTS, *rows.REDUCTIONS, *_MAXIMA, "aten::dropout", "aten::detach", "aten::tril", "aten::triu",
}  # fmt: skip
_STEPS = 64
_WEIGHTS = ("p_", "b_", "c_")


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention that ends in this contraction; None if no product of queries and keys leads to it."""
    tensors = terms(node)
    for order, tensor in enumerate(tensors):
        if leads(tensor, _SCORES, _BETWEEN) is None:
            continue
        fold = folded_heads(node) if value(node).dim() == 3 else None
        for heads in (fold, None) if fold is not None else (None,):
            found = _read(node, order, constants, heads)
            if isinstance(found, Region) and linear_form(found.spec) is None:
                # A decay by distance is read as a table; as a formula it may make the attention linear.
                deep = _read(node, order, constants, heads, deep=True)
                found = deep if isinstance(deep, Region) and linear_form(deep.spec) is not None else found
            if found is not None:
                return found
    return None


def terms(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two tensors that a product of batches multiplies and sums; nothing for any other node."""
    if op_name(node) not in PRODUCTS or value(node).dim() < 3 or not is_contraction(node):
        return ()
    found = pair(node, marks(node), ex.k)
    return () if found is None else (found[0][0], found[1][0])


def marks(node: fx.Node) -> tuple[sp.Symbol, ...]:
    """One symbol for each dimension."""
    return tuple(sp.Symbol(f"o{i}", integer=True, nonnegative=True) for i in range(value(node).dim()))


def leads(node: fx.Node, targets: Iterable[str], through: Iterable[str]) -> fx.Node | None:
    """The nearest node of one of the operators `targets` behind `node`, through the operators `through`."""
    queue, seen = [node], {node}
    while queue and len(seen) < _STEPS:
        current = queue.pop(0)
        name = op_name(current)
        if name in targets:
            return current
        if name in through:
            fresh = [n for n in current.all_input_nodes if n not in seen and isinstance(value(n), torch.Tensor)]
            seen.update(fresh)
            queue += fresh
    return None


def sides(output: fx.Node, order: int) -> tuple[int, int] | None:
    """The output's dimensions of the query position and of the value width, if operand `order` holds the weights."""
    at = marks(output)
    operands = pair(output, at, ex.k)
    if operands is None:
        return None
    weights, values = operands if order == 0 else operands[::-1]
    own = [i for i, m in enumerate(at) if m in weights[1] and m not in values[1] and shape(output)[i] != 1]
    wide = [i for i, m in enumerate(at) if m in values[1] and m not in weights[1] and shape(output)[i] != 1]
    return (own[0], wide[0]) if len(own) == len(wide) == 1 else None


def _read(
    node: fx.Node, order: int, constants: Mapping[str, torch.Tensor], fold: int | None, deep: bool = False
) -> Region | Decline | None:
    dims = sides(node, order)
    if dims is None:
        return None
    framed = frame(node, *dims, extent(node), sp.S.Zero, fold)
    if isinstance(framed, Decline):
        return None
    lifter = Lifter(framed.sizes, constants, deep=deep)
    operands = pair(node, framed.index, ex.k)
    assert operands is not None
    others = sp.Mul(*[ex.as_number(lifter.lift(*side)) for side in factors(node, framed.index)])
    weights, values = operands if order == 0 else operands[::-1]
    found = ex.as_number(lifter.lift(*weights))
    products = [p for load in found.atoms(ex.Load) if (p := product(load, lifter))]
    if len({load for load, _, _ in products}) != 1 or others.has(width):
        return None
    load, query, key = products[0]
    if not _activations(framed, query, key, values):
        return None
    made = lifter.nodes[load.args[0].name]
    framed.sizes.sizes[ex.d] = extent(made)
    row = rows.read(found, load, lifter)
    if isinstance(row, Decline):
        return row
    if _plain(row):
        return None
    gate = row.weight if not row.weight.has(ex.s) and not ex.depends(row.weight, ex.k) else sp.S.One
    dropped = 1 - math.prod(1 - p for p in lifter.dropout.values())
    parts = Parts(
        "pointwise", node, node, row.masked,
        Place(*query, ex.q, ex.d), Place(*key, ex.k, ex.d), Place(*values, ex.k, width),
        gate * others, dropped, made, row.normalizer, row.weight if gate is sp.S.One else sp.S.One,
    )  # fmt: skip
    region = build(parts, framed, lifter)
    return None if isinstance(region, Region) and _over_channels(region) else region


def product(load: ex.Load, lifter: Lifter) -> tuple[ex.Load, Side, Side] | None:
    """The load of a product of queries and keys, with its query and key sides."""
    made = lifter.nodes.get(load.args[0].name)
    if not is_contraction(made) or not extent(made).is_Integer:
        return None
    found = contract(made, load.args[1:], ex.d)
    if found is None:
        return None
    for query, key in (found, found[::-1]):
        over = [any(i.has(c) for i in side[1]) for side in (query, key) for c in (ex.q, ex.k)]
        if over == [True, False, False, True]:
            return load, query, key
    return None


def _plain(row: rows.Row) -> bool:
    """Whether nothing but a factor by row stands between the two products: then it is no attention for certain."""
    ratio = row.masked.score / ex.s
    return row.masked.keep == sp.true and not row.divided and not ratio.has(ex.s) and not ex.depends(ratio, ex.k)


def _activations(framed: Frame, query: Side, key: Side, values: Side) -> bool:
    """Whether all three are computed from the model's inputs, keys and values for each batch entry on its own."""
    entries = {b for b in framed.batch if framed.extent(b) != 1}
    for _, index in (key, values):
        # What has no dimension for the batch at all is shared by it, even if there is one entry only.
        if len(index) < 3 or entries - {x for i in index for x in i.free_symbols}:
            return False
    return all(is_activation(node) for node, _ in (query, key, values))


def is_activation(node: fx.Node) -> bool:
    """Whether a value depends on an input of the model that is no parameter, buffer or constant."""
    return behind("activation", node, _is_input)


def _is_input(node: fx.Node) -> bool | None:
    if node.op != "placeholder":
        return None
    return not node.meta.get(WEIGHT) and not str(node.target).startswith(_WEIGHTS)


def _over_channels(region: Region) -> bool:
    """Whether positions of the query are features of the linear map that made it: attention over channels."""
    for operand, position in ((region.query, "q"), (region.key, "k")):
        marks = {d: sp.Symbol(d, integer=True, nonnegative=True) for d in operand.dims if isinstance(d, str)}
        marks |= {"bh": sp.Symbol("bh", integer=True, nonnegative=True)}
        index = tuple(marks.get(d, sp.S.Zero) if isinstance(d, str) else marks["bh"] for d in operand.dims)
        sizes = {m: n for m, n in zip(index, shape(operand.node), strict=True) if m.is_Symbol}
        walk = Walk(Sizes(sizes), None)
        try:
            walk.visit(operand.node, index, ())
        except (NotImplementedError, TypeError):
            continue
        for leaf in walk.leaves:
            if op_name(leaf.node) in LINEAR and marks[position] in leaf.index[-1].free_symbols:
                return True
    return False
