"""Softmax attention: a softmax whose argument holds one contraction and whose result enters another."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.contraction import Side, contract, extent
from attnopt.patterns.lift import CONTRACTIONS, Lifter
from attnopt.patterns.masks import split
from attnopt.patterns.operands import Place, walk
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.views import CASTS, VIEWS, Index, same, shape
from attnopt.region import Region

SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::special_softmax"}
# What may stand between the weights and the values; whether it changes them is read, not assumed.
_BETWEEN = {
    "aten::dropout", "aten::mul", "aten::div", "aten::add", "aten::sub", "aten::masked_fill", "aten::nan_to_num",
    "aten::clamp", *VIEWS, *CASTS,
}  # fmt: skip


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention around a softmax; None when the softmax feeds no contraction."""
    if op_name(node) not in SOFTMAX:
        return None
    output = _applied(node)
    if output is None:
        return None
    plain = _read(node, output, constants, None)
    fold = folded_heads(output) if value(output).dim() == 3 else None
    if fold is None:
        return plain
    folded = _read(node, output, constants, fold)
    return folded if isinstance(folded, Region) else plain


def _applied(node: fx.Node) -> fx.Node | None:
    """The contraction that applies the weights, through views, casts, dropout and scales."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if op_name(user) in CONTRACTIONS - {"aten::linear", "aten::baddbmm"}:
                return user
            if op_name(user) in _BETWEEN and user.args and user.args[0] is current:
                queue.append(user)
    return None


def _read(node: fx.Node, output: fx.Node, constants: Mapping[str, torch.Tensor], fold: int | None) -> Region | Decline:
    sides = _sides(node, output)
    if isinstance(sides, Decline):
        return sides
    query_dim, width_dim = sides
    framed = frame(output, query_dim, width_dim, extent(output), sp.S.Zero, fold)
    if isinstance(framed, Decline):
        return framed
    lifter = Lifter(framed.sizes, constants)
    lifter.stops.add(node)
    operands = contract(output, framed.index, ex.k)
    weights, values = operands if ex.k in operands[0][1] and _reaches(operands[0][0], node) else operands[::-1]
    found = lifter.lift(*weights)
    heart = [load for load in found.atoms(ex.Load) if load.args[0].name == node.name]
    gate = sp.cancel(found / heart[0]) if len(heart) == 1 else None
    if gate is None or gate.has(ex.k) or gate.has(heart[0]):
        return Decline("the weights are changed between the softmax and the values", weights[0])
    index, dim = heart[0].args[1:], arguments(node)["dim"] % len(heart[0].args[1:])
    over = index[dim] == ex.k or (index[dim] == 0 and framed.single(ex.k))
    if not over or any(i.has(ex.k) for n, i in enumerate(index) if n != dim):
        return Decline("the softmax does not run over the keys", node)
    if not same(shape(node)[dim], framed.extent(ex.k)):
        return Decline("the softmax runs over more than the keys whose values are summed", node)
    dropout = dict(lifter.dropout)
    return _scores(node, output, framed, lifter, index, values, gate, dropout)


def _scores(
    node: fx.Node, output: fx.Node, framed: Frame, lifter: Lifter, index: Index, values: Side, gate: sp.Expr,
    dropout: Mapping[fx.Node, float],
) -> Region | Decline:  # fmt: skip
    """Read the logit at `index`, pick the contraction that is `s`, and build the region."""
    logit = ex.as_number(lifter.lift(node.args[0], index))
    if set(lifter.dropout) - set(dropout):
        return Decline("dropout acts on the scores", node)
    logit = sp.expand_mul(logit, deep=False) if isinstance(logit, sp.Mul) else logit
    declined: Decline | None = None
    for load in sorted(logit.atoms(ex.Load), key=str):
        product = lifter.nodes[load.args[0].name]
        sides = contract(product, load.args[1:], ex.d) if op_name(product) in CONTRACTIONS else None
        if sides is None:
            continue
        key, query = sides if _over(sides[0], ex.k) or _over(sides[1], ex.q) else sides[::-1]
        # A single key or query leaves no trace in an index: its one position is 0.
        if not (_over(key, ex.k) or framed.single(ex.k)) or _over(query, ex.k) or not extent(product).is_Integer:
            continue
        framed.sizes.sizes[ex.d] = extent(product)
        places = Place(*query, ex.q, ex.d), Place(*key, ex.k, ex.d), Place(*values, ex.k, width)
        masked = split(logit.xreplace({load: ex.s}), lifter.finite)
        dropped = 1 - math.prod(1 - p for p in dropout.values())
        parts = Parts("softmax", node, output, masked, *places, gate, dropped, product)
        region = build(parts, framed, lifter)
        if isinstance(region, Region):
            return region
        declined = declined or region
    return declined or Decline("no contraction of queries and keys makes the scores", node)


def _over(side: tuple[fx.Node, tuple[sp.Expr, ...]], symbol: sp.Symbol) -> bool:
    return any(i.has(symbol) for i in side[1])


def _reaches(node: fx.Node, target: fx.Node) -> bool:
    while node is not target:
        if op_name(node) not in _BETWEEN or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _sides(node: fx.Node, output: fx.Node) -> tuple[int, int] | Decline:
    """Which dimensions of the output are the query position and the value width."""
    marks = tuple(sp.Symbol(f"o{i}", integer=True, nonnegative=True) for i in range(value(output).dim()))
    operands = contract(output, marks, ex.k)
    if operands is None:
        return Decline("the contraction that applies the weights has a form that is not known", output)
    reached = [_reaches(side[0], node) for side in operands]
    if reached == [True, True]:
        return Decline("both operands of the contraction come from the softmax", output)
    if True not in reached:
        return Decline("the way from the softmax to the values is not known", output)
    weights, values = operands if reached[0] else operands[::-1]
    sizes = shape(output)
    left = [i for i, m in enumerate(marks) if m in weights[1] and m not in values[1]]
    right = [i for i, m in enumerate(marks) if m in values[1] and m not in weights[1]]
    # A batch dimension that one operand broadcasts looks like its own; the trailing one is the true one.
    left = [i for i in left if i >= len(marks) - 2 or sizes[i] != 1][-1:] if len(left) > 1 else left
    right = right[-1:] if len(right) > 1 else right
    if len(left) != 1 or len(right) != 1:
        return Decline("the output has no single query dimension and no single value dimension", output)
    return left[0], right[0]


def folded_heads(output: fx.Node) -> int | None:
    """The number of heads that a three-dimensional contraction carries in its batch, read off the views around it."""
    framed = frame(output, 1, 2, extent(output), sp.S.Zero, None)
    if isinstance(framed, Decline) or not framed.batch:
        return None
    lifter = Lifter(framed.sizes)
    operands = contract(output, framed.index, ex.k)
    for side in operands or ():
        for _, index, _ in walk(Place(*side, ex.k, width), lifter):
            for part in index:
                for found in part.atoms(ex.Mod, ex.FloorDiv):
                    if found.args[0] == framed.batch[0] and found.args[1].is_Integer:
                        return int(found.args[1])
    return None
