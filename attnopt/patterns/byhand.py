"""The softmax written by hand: exponentials over their sum, a log-softmax or a log-sum-exp under an exponential.

Anchored at the contraction that applies the weights (or at the division behind it). The weights are lifted; the sum
of exponentials that they load is taken apart into a logit, a sink and a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns import shifts, weights
from attnopt.patterns.applied import Applied, Rows, apply, finish, folded_heads, is_applying, products
from attnopt.patterns.contraction import is_contraction, operands
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import HUGE, Masked, split
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import CASTS, VIEWS, Index, same, shape
from attnopt.region import Region
from attnopt.spec import EmptyRow

REDUCTIONS = {"aten::sum", "aten::logsumexp", "aten::log_softmax"}
_BETWEEN = {*POINTWISE, *VIEWS, *CASTS, "aten::dropout", "aten::detach"}
_STEPS = 48
_SWALLOWED = (
    "a row whose scores are all finfo.min does not sum to one: the logarithm of their count is lost beside them"
)
_Z = sp.Symbol("total", positive=True)


@dataclass(frozen=True)
class Quotient:
    """Weights as `factor * exp(logit) / (sum of exp(logit) over the keys + rest)`; `factor` in terms of `weights.P`.

    `stable`: the source's operator takes the row's maximum off by itself.
    """

    logit: sp.Expr
    rest: sp.Expr
    factor: sp.Expr
    stable: bool = False


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention whose weights are normalised by hand; None if this contraction applies no such weights."""
    contraction = _divided(node)
    if contraction is None or value(contraction).dim() < 2:
        return None
    marks = tuple(sp.Symbol(f"o{i}", integer=True, nonnegative=True) for i in range(value(contraction).dim()))
    for operand, _ in operands(contraction, marks, ex.k):
        stops = _stops(operand if contraction is node else node, contraction)
        if not any(op_name(n) in REDUCTIONS for n in stops) or (contraction is not node and not _exponential(operand)):
            continue
        for fold in (folded_heads(contraction), None) if value(contraction).dim() == 3 else (None,):
            found = _read(node, contraction, operand, stops, constants, fold)
            if isinstance(found, Region) or (isinstance(found, Decline) and fold is None):
                return found
    return None


def _divided(node: fx.Node) -> fx.Node | None:
    """The contraction: the node itself, or what it divides."""
    if is_applying(node):
        return node
    if op_name(node) in ("aten::div", "aten::mul"):
        inner = node.args[0]
        if isinstance(inner, fx.Node) and is_applying(inner) and isinstance(node.args[1], fx.Node):
            return inner if shape(inner) == shape(node) else None
    return None


def _stops(node: fx.Node, contraction: fx.Node) -> set[fx.Node]:
    """The contraction, and the sums and maxima over rows that stand behind the node."""
    found = {n for n in _behind(node) if op_name(n) in REDUCTIONS or shifts.maximum(n) is not None}
    return found if contraction is node else {*found, contraction}


def _exponential(node: fx.Node) -> bool:
    return any(op_name(n) == "aten::exp" for n in _behind(node))


def _behind(node: fx.Node) -> list[fx.Node]:
    """What stands behind the node, through pointwise operators and views, up to products, sums and maxima."""
    queue, seen = [node], [node]
    while queue and len(seen) < _STEPS:
        current = queue.pop(0)
        if op_name(current) in _BETWEEN or (current is node and is_applying(current)):
            fresh = [n for n in current.all_input_nodes if n not in seen and isinstance(value(n), torch.Tensor)]
            seen += fresh
            queue += fresh
    return seen


def _read(
    node: fx.Node, contraction: fx.Node, operand: fx.Node, stops: Iterable[fx.Node],
    constants: Mapping[str, torch.Tensor], fold: int | None,
) -> Region | Decline | None:  # fmt: skip
    site = apply(contraction, lambda n: n is operand, constants, fold, stops)
    if isinstance(site, Decline) or not value(operand).dtype.is_floating_point:
        return None
    site.lifter.limit = torch.finfo(value(operand).dtype).max
    whole = site.weights
    if contraction is not node:
        outside = ex.as_number(site.lifter.lift(node, site.frame.index))
        heart = [load for load in outside.atoms(ex.Load) if load.args[0].name == contraction.name]
        if len(heart) != 1 or heart[0].args[1:] != site.frame.index:
            return None
        whole = whole * (outside / heart[0])
    found = quotient(whole, site.lifter, {})
    if found is None and any(_swallows(load, site.lifter) for load in whole.atoms(ex.Load)):
        return Decline(_SWALLOWED, node)
    if found is None or not any(products(load, site) for load in found.logit.atoms(ex.Load)):
        return None
    rows = _rows(found, site)
    if rows is None:
        return None
    region = finish(node, node, site, rows, dict(site.lifter.dropout))
    if isinstance(region, Region) and contraction is not node:
        return region.replace(claims=region.claims | {contraction})
    return region


def _rows(found: Quotient, site: Applied) -> Rows | None:
    changed = weights.read(found.factor)
    left = {load for e in found.factor.atoms(sp.exp) for load in e.atoms(ex.Load)}
    # Exponentials of other scores than those of the sum: no weights that add up to one.
    if changed is None or any(is_contraction(site.lifter.nodes.get(load.args[0].name)) for load in left):
        return None
    shift = shifts.shift_of(found.logit, site.lifter)
    logit = shifts.remove(found.logit, shift)
    if logit is None or (shift != 0 and not shifts.matches(shift, logit, site.lifter)):
        return None
    sink = None
    if found.rest != 0:
        sink = log(found.rest * sp.exp(-shift), {})
        if sink is None or sink.has(ex.k) or any(products(load, site) for load in sink.atoms(ex.Load)):
            return None
    stable = found.stable or shift != 0 or found.logit.has(weights.P)

    def masked(x: sp.Expr) -> Masked:
        seen = weights.guarded(x, site.lifter)
        # Without the maximum taken off, the exponential of a huge negative fill is zero like that of -inf.
        plain = seen.empty_row is EmptyRow.UNIFORM and not stable
        return Masked(seen.score, seen.keep, EmptyRow.NAN) if plain else seen

    return Rows(masked, logit, changed, sink)


def quotient(whole: sp.Expr, lifter: Lifter, known: Mapping[ex.Load, sp.Expr]) -> Quotient | None:
    """Take the one sum of exponentials in an expression apart.

    `known`: loads that are exponentials already (weights of a softmax), with their logits up to a row constant.
    """
    loads = [load for load in sorted(whole.atoms(ex.Load), key=str) if _is_reduction(load, lifter)]
    if len(loads) != 1:
        return None
    (load,) = loads
    node = lifter.nodes[load.args[0].name]
    summand = _summand(node, load.args[1:], lifter)
    if summand is None:
        return None
    if op_name(node) == "aten::log_softmax":
        factor = _exponents(whole, load, lambda rest, power: sp.exp(rest) * weights.P if power == 1 else None)
        return Quotient(summand, sp.S.Zero, factor, True) if factor is not None and not factor.has(load) else None
    if op_name(node) == "aten::logsumexp":
        if _swallows(load, lifter):
            return None
        summand = sp.exp(summand)
        found = _exponents(whole, load, lambda rest, power: sp.exp(rest) * _Z**power)
    else:
        found = whole.xreplace({load: _Z})
    return None if found is None else _apart(found, summand, known)


def _swallows(load: ex.Load, lifter: Lifter) -> bool:
    """Whether a load is a logsumexp of scores with a fill that is too large for the logarithm of a count to count."""
    node = lifter.nodes[load.args[0].name]
    summand = _summand(node, load.args[1:], lifter) if op_name(node) == "aten::logsumexp" else None
    if summand is None or not any(x <= HUGE for x in summand.atoms(sp.Rational)):
        return False
    masked = split(summand, lifter.finite, lifter.limit)
    return not weights.never_empty(masked.keep) or any(x <= HUGE for x in masked.score.atoms(sp.Rational))


def _apart(whole: sp.Expr, summand: sp.Expr, known: Mapping[ex.Load, sp.Expr]) -> Quotient | None:
    divisors = {p for p in whole.atoms(sp.Pow) if p.base.has(_Z)}
    if len(divisors) != 1:
        return None
    (divisor,) = divisors
    share, rest = divisor.base.coeff(_Z), sp.expand(divisor.base).xreplace({_Z: sp.S.Zero})
    if divisor.exp != -1 or not share.is_positive or sp.expand(divisor.base - share * _Z - rest) != 0:
        return None
    marks = {f: sp.Dummy(positive=True) for f in sp.Mul.make_args(summand) if not f.is_number}
    marked = whole.xreplace({divisor: weights.P / share / sp.Mul(*sp.Mul.make_args(summand)).xreplace(marks)} | marks)
    factor = marked.xreplace({mark: f for f, mark in marks.items()})
    logit = log(summand, known)
    hidden = rest != 0 and bool(summand.atoms(ex.Load) & set(known))
    if logit is None or factor.has(_Z) or hidden or any(_may_vanish(p) for p in factor.atoms(sp.Pow)):
        return None
    return Quotient(logit, sp.expand(rest / share), factor)


def _may_vanish(power: sp.Pow) -> bool:
    return bool(power.exp.is_negative and (power.base.has(ex.Where) or power.base.has(ex.Load)))


def _exponents(whole: sp.Expr, load: ex.Load, make: object) -> sp.Expr | None:
    """The expression with each exponential of the load, `exp(rest + power*load)`, made anew."""
    found: dict[sp.Basic, sp.Expr] = {}
    for node in whole.atoms(sp.exp):
        if node.args[0].has(load):
            terms = sp.expand(node.args[0])
            power = terms.coeff(load)
            rest = node.args[0] - power * load
            rest = sp.expand(terms - power * load) if rest.has(load) else rest
            made = make(rest, power) if power.is_Integer else None  # type: ignore[operator]
            if made is None:
                return None
            found[node] = made
    whole = whole.xreplace(found)
    return None if whole.has(load) else whole


def log(e: sp.Expr, known: Mapping[ex.Load, sp.Expr]) -> sp.Expr | None:
    """The logarithm of an expression that is positive or zero for certain; None where that is not known."""
    if e == 0:
        return ex.NEG_INF
    if e in known:
        return known[e]
    if isinstance(e, sp.exp):
        return e.args[0]
    if e.is_number:
        return sp.log(e) if e.is_positive else None
    if isinstance(e, ex.Where):
        parts = [log(x, known) for x in e.args[1:]]
        return None if None in parts else ex.Where(e.args[0], *parts)
    if isinstance(e, sp.Mul):
        return _log_product(e, known)
    if isinstance(e, sp.Add) and all(log(x, {}) is not None for x in e.args):
        return sp.log(e)
    return None


def _log_product(e: sp.Mul, known: Mapping[ex.Load, sp.Expr]) -> sp.Expr | None:
    """Tests go to the outside: where one fails, the product is zero."""
    for test in e.args:
        if isinstance(test, ex.Where) and 0 in test.args[1:]:
            rest = sp.Mul(*[a for a in e.args if a is not test])
            parts = [log(rest * x, known) for x in test.args[1:]]
            return None if None in parts else ex.Where(test.args[0], *parts)
    parts = [log(x, known) for x in e.args]
    return None if None in parts else sp.Add(*parts)


def _is_reduction(load: ex.Load, lifter: Lifter) -> bool:
    node = lifter.nodes.get(load.args[0].name)
    return op_name(node) in REDUCTIONS and not is_applying(node)


def _summand(node: fx.Node, index: Index, lifter: Lifter) -> sp.Expr | None:
    """What is summed over the keys, at key `k`; the logits of a log-softmax at the loaded place."""
    a = arguments(node)
    source = node.args[0]
    dims = a["dim"]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    sizes = shape(source)
    if len(dims) != 1 or not same(sizes[dims[0] % len(sizes)], lifter.sizes.sizes[ex.k]):
        return None
    place = dims[0] % len(sizes)
    if op_name(node) == "aten::log_softmax":
        at = index if index[place] == ex.k else None
        rest = [i for n, i in enumerate(index) if n != place]
    else:
        rest = list(index)
        at = (*index[:place], ex.k, *index[place + bool(a.get("keepdim")) :])
    if at is None or any(i.has(ex.k) for i in rest):
        return None
    return ex.as_number(lifter.lift(source, at))
