"""Weights that are a sum of softmaxes, or a softmax times a factor of each weight.

`weights = sum_i c_i * softmax_i` with `c_i` in `b, h, q` is a sum of attentions over the same values: differential
attention, grouped or not, and averages of two maps. A factor in `k` or in the score is `weight`: signed softmax.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.contraction import Side, extent, factors, is_contraction, pair
from attnopt.patterns.expansion import expanded
from attnopt.patterns.lift import Lifter
from attnopt.patterns.operands import Place
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.pointwise import product, sides, terms
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.softmax import SOFTMAX, folded_heads
from attnopt.patterns.views import CASTS, VIEWS, same, shape
from attnopt.patterns.weights import guarded, unresolved
from attnopt.region import Region

_THROUGH = {*POINTWISE, *VIEWS, *CASTS, "aten::dropout", "aten::stack", "aten::cat"}
_JOINTS = {"aten::add", "aten::sub", "aten::rsub"}
_STEPS = 48


class _Softmaxes(set[fx.Node]):
    """Every softmax of a graph, which is not walked for it."""

    def __contains__(self, node: object) -> bool:
        return op_name(node) in SOFTMAX


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The sum of attentions that a softmax is the first term of; None if it is none."""
    if op_name(node) not in SOFTMAX:
        return None
    found = _applied(node)
    if found is None:
        return None
    output, order = found
    if not _joins(terms(output)[order]):
        return None
    fold = folded_heads(output) if value(output).dim() == 3 else None
    for heads in (fold, None) if fold is not None else (None,):
        region = _read(node, output, order, constants, heads)
        if region is not None:
            return region
    return None


def _applied(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The product that applies the weights, and which of its operands they are."""
    queue, seen = [node], {node}
    while queue and len(seen) < _STEPS:
        current = queue.pop(0)
        for user in current.users:
            if current in terms(user):
                return user, terms(user).index(current)
            through = op_name(user) in _THROUGH or not op_name(user)
            if user not in seen and user.op == "call_function" and through:
                seen.add(user)
                queue.append(user)
    return None


def _joins(weights: fx.Node) -> bool:
    """Whether the weights can be more than one softmax and a factor: a sum, or a product of queries and keys."""
    queue, seen = [weights], {weights}
    while queue and len(seen) < _STEPS:
        current = queue.pop(0)
        if op_name(current) in _JOINTS or is_contraction(current):
            return True
        through = op_name(current) in _THROUGH or not op_name(current)
        for source in current.all_input_nodes if through else ():
            if source not in seen and source.op == "call_function":
                seen.add(source)
                queue.append(source)
    return False


def _read(
    node: fx.Node, output: fx.Node, order: int, constants: Mapping[str, torch.Tensor], fold: int | None
) -> Region | Decline | None:
    dims = sides(output, order)
    if dims is None:
        return None
    count, found, claims = 1, [], set()
    while len(found) < count:
        framed = frame(output, *dims, extent(output), sp.S.Zero, fold)
        if isinstance(framed, Decline):
            return None
        lifter = Lifter(framed.sizes, constants)
        lifter.stops = _Softmaxes()
        operands = pair(output, framed.index, ex.k)
        if operands is None or factors(output, framed.index):
            return None
        weights, values = operands if order == 0 else operands[::-1]
        hearts = _hearts(lifter.lift(*weights), lifter)
        if hearts is None or lifter.dropout:
            return None
        heart, factor = hearts[len(found)]
        count = len(hearts)
        first = min(lifter.nodes[h.args[0].name] for h, _ in hearts)
        if first is not node or (count == 1 and not _signed(factor, lifter)):
            return None
        term = _term(heart, factor, output, framed, lifter, values)
        if not isinstance(term, Region):
            return term
        found.append(term)
        claims.add(term.anchor)
    return found[0].replace(merge=tuple(found[1:]), claims=frozenset(claims - {node}))


def _hearts(weights: sp.Basic, lifter: Lifter) -> list[tuple[ex.Load, sp.Expr]] | None:
    """Each softmax that the weights load, with its factor; None where they are no sum of such products."""
    found = expanded(
        ex.as_number(weights).replace(
            lambda e: isinstance(e, ex.Where) and e.args[2] == 0 and e.args[1] != 1,
            lambda e: ex.Where(e.args[0], sp.S.One, sp.S.Zero) * e.args[1],
        )
    )
    if found is None:
        return None
    hearts = [x for x in found.atoms(ex.Load) if lifter.nodes[x.args[0].name] in lifter.stops]
    hearts.sort(key=lambda x: (lifter.nodes[x.args[0].name], len(str(x)), str(x)))
    parts = [(x, found.coeff(x)) for x in hearts]
    if not parts or any(c.has(*hearts) for _, c in parts):
        return None
    return parts if sp.expand(found - sum(x * c for x, c in parts)) == 0 else None


def _signed(factor: sp.Expr, lifter: Lifter) -> bool:
    """Whether a factor is made of a product of queries and keys, as the sign of a score is."""
    return any(is_contraction(lifter.nodes[x.args[0].name]) for x in factor.atoms(ex.Load))


def _weighs(factor: sp.Expr) -> bool:
    """Whether a factor differs from key to key."""
    return ex.depends(factor, ex.k)


def _term(
    heart: ex.Load, factor: sp.Expr, output: fx.Node, framed: Frame, lifter: Lifter, values: Side
) -> Region | Decline | None:
    node, index = lifter.nodes[heart.args[0].name], heart.args[1:]
    dim = arguments(node)["dim"] % len(index)
    over = index[dim] == ex.k and not any(i.has(ex.k) for n, i in enumerate(index) if n != dim)
    if not over or not same(shape(node)[dim], framed.extent(ex.k)):
        return None
    logit = ex.as_number(lifter.lift(node.args[0], index))
    products = [p for load in logit.atoms(ex.Load) if (p := product(load, lifter))]
    if len(products) != 1 or lifter.dropout:
        return None
    load, query, key = products[0]
    made = lifter.nodes[load.args[0].name]
    framed.sizes.sizes[ex.d] = extent(made)
    parts = [(f, _weighs(f)) for f in sp.Mul.make_args(sp.factor_terms(factor))]
    weight = sp.Mul(*[f for f, weighs in parts if weighs]).xreplace({load: ex.s})
    if _signed(weight, lifter):
        return None
    masked = guarded(logit.xreplace({load: ex.s}), lifter)
    if unresolved((masked.score, masked.keep, weight)):
        return Decline("scores that are no number are replaced by others, and a softmax keeps them", node)
    places = Place(*query, ex.q, ex.d), Place(*key, ex.k, ex.d), Place(*values, ex.k, width)
    gate = sp.Mul(*[f for f, weighs in parts if not weighs])
    return build(Parts("sum", node, output, masked, *places, gate, product=made, weight=weight), framed, lifter)
