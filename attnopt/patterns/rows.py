"""Weights without a softmax call, read as a score, a mask and what a row is divided by.

`weights = core(s, k) * row(sums over k)`: where a sum in `row` is that of `core` (or of its absolute value), it is
the `t` (or `a`) of a `Pointwise` normaliser. `w(s) * exp(x) / sum exp(x)` is a softmax with the factor `w`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import sympy as sp
from sympy.logic.boolalg import Boolean
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import HUGE, Masked, split
from attnopt.patterns.safety import depends
from attnopt.patterns.views import Index, same, shape
from attnopt.spec import EmptyRow, Normalizer, Pointwise, Softmax

_NORMS = {"aten::linalg_vector_norm", "aten::norm"}
REDUCTIONS = {"aten::sum", "aten::mean", *_NORMS}
_MAXIMA = {"aten::amax", "aten::max.dim"}


@dataclass(frozen=True)
class Row:
    """The weights of a row: `normalizer` of `masked`, each times `weight`. `divided` where sums were found."""

    masked: Masked
    normalizer: Normalizer
    weight: sp.Expr = sp.S.One
    divided: bool = False


@dataclass(frozen=True)
class _Sum:
    """A reduction that the weights load: `factor` times the sum over the keys of `raw`."""

    load: ex.Load
    raw: sp.Expr
    factor: sp.Expr

    @property
    def node(self) -> str:
        """Name of the node that it loads."""
        return str(self.load.args[0])


def read(weights: sp.Expr, product: ex.Load, lifter: Lifter) -> Row | Decline:
    """The row that `weights`, an expression at key `k` with the loaded `product`, belongs to."""
    sums: list[_Sum] = []
    for load in sorted(weights.atoms(ex.Load), key=str):
        found = _reduction(load, product, lifter)
        if isinstance(found, Decline):
            return found
        if found is not None:
            sums.append(found)
    weights = weights.xreplace({product: ex.s})
    if len(sums) == 1:
        softmax = _softmax(*_parted(weights, sums), sums[0], sums[0].raw, None, lifter)
        if softmax is not None:
            return softmax
    score, keep = peel(weights)
    core, row = _parted(score, sums)
    if not sums:
        return Row(Masked(core, keep, EmptyRow.ZERO), Pointwise())
    first = lifter.nodes[sums[0].node]
    if row.has(ex.s) or ex.depends(row, ex.k):
        return Decline("a sum over the keys enters the weights otherwise than as a divisor", first)
    values: dict[sp.Basic, sp.Expr] = {}
    for x in sums:
        inner, kept = peel(x.raw)
        total = _total(core, inner)
        if kept != keep or total is None:
            what = "over other keys than its own" if kept != keep else "of something else than its weights"
            return Decline(f"a row is divided by a sum {what}", lifter.nodes[x.node])
        softmax = _softmax(core, row, x, inner, keep, lifter) if len(sums) == 1 else None
        if softmax is not None:
            return softmax
        values[x.load] = x.factor * total
    return Row(Masked(core, keep, EmptyRow.ZERO), Pointwise(1 / row.xreplace(values)), divided=True)


def _parted(score: sp.Expr, sums: list[_Sum]) -> tuple[sp.Expr, sp.Expr]:
    """The factors without the sums, and those with them."""
    loads = {x.load for x in sums}
    row = [f for f in sp.Mul.make_args(score) if f.atoms(ex.Load) & loads]
    return sp.Mul(*[f for f in sp.Mul.make_args(score) if f not in row]), sp.Mul(*row)


def _softmax(
    core: sp.Expr, row: sp.Expr, total: _Sum, inner: sp.Expr, keep: Boolean | None, lifter: Lifter
) -> Row | None:
    """`w * exp(x) / sum exp(x)`, also with the row's maximum subtracted from `x`. `keep` None: the mask is in `x`."""
    coefficient, power = inner.as_coeff_Mul()
    if not isinstance(power, sp.exp):
        return None
    weight, scale = quotient(core, power), row * total.load / (total.factor * coefficient)
    if not scale.is_number or (weight.has(sp.exp) and weight.has(ex.s)):
        return None
    terms = sp.Add.make_args(sp.expand(power.args[0]))
    constant = (x for x in terms if isinstance(-x, ex.Load) and not x.has(ex.k))
    maxima = [x for x in constant if op_name(lifter.nodes[(-x).args[0].name]) in _MAXIMA]
    logit = sp.Add(*[x for x in terms if x not in maxima])
    if keep is not None:
        return Row(Masked(logit, keep, EmptyRow.NAN), Softmax(), scale * weight, True)
    masked = split(logit, lifter.finite)
    if not maxima:
        masked = replace(masked, empty_row=EmptyRow.NAN)
    return Row(masked, Softmax(), scale * weight, True)


def _total(core: sp.Expr, inner: sp.Expr) -> sp.Expr | None:
    """The sum of `inner` in terms of the sums of the row's weights."""
    for part, total in ((core, ex.t), (sp.Abs(core), ex.t if nonnegative(core) else ex.a)):
        ratio = quotient(inner, part)
        if not ratio.has(ex.s) and not ex.depends(ratio, ex.k):
            return ratio * total
    return None


def quotient(x: sp.Expr, y: sp.Expr) -> sp.Expr:
    """`x / y` with its exponentials joined."""
    factors = sp.Mul.make_args(x / y)
    exponent = sp.expand(sp.Add(*[f.args[0] for f in factors if isinstance(f, sp.exp)]))
    return sp.Mul(*[f for f in factors if not isinstance(f, sp.exp)]) * sp.exp(exponent)


def _reduction(load: ex.Load, product: ex.Load, lifter: Lifter) -> _Sum | Decline | None:
    """The sum over a row's keys that a load is; None if it loads something else."""
    node = lifter.nodes.get(load.args[0].name)
    if not isinstance(node, fx.Node) or op_name(node) not in REDUCTIONS:
        return None
    own = depends(node, lifter.nodes[product.args[0].name])
    if own and any(i.has(ex.k) for i in load.args[1:]):
        return Decline("the scores are also summed over the queries", node)
    summand = summed(node, load.args[1:], lifter)
    if summand is None:
        euclid = own and op_name(node) in _NORMS
        return Decline("a row is divided by another norm than the sum of its weights", node) if euclid else None
    raw, factor = summand
    if not raw.has(product):
        return None
    inner = (op_name(lifter.nodes.get(x.args[0].name)) for x in raw.atoms(ex.Load))
    if any(name in REDUCTIONS for name in inner):
        return Decline("rows are normalised more than once", node)
    return _Sum(load, raw.xreplace({product: ex.s}), factor)


def summed(node: fx.Node, index: Index, lifter: Lifter, over: sp.Symbol = ex.k) -> tuple[sp.Expr, sp.Expr] | None:
    """For a sum over one dimension, as long as the coordinate `over`: the summand there, and a factor of the sum."""
    a = arguments(node)
    rank = len(shape(node.args[0]))
    dims = a.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    absolute = op_name(node) in _NORMS
    if len(dims) != 1 or (absolute and a.get("ord", a.get("p")) != 1):
        return None
    place, at = dims[0] % rank, list(index)
    if len(at) != rank:
        at.insert(place, sp.S.Zero)
    at[place] = over
    if not same(shape(node.args[0])[place], lifter.sizes.sizes[over]):
        return None
    summand = ex.as_number(lifter.lift(node.args[0], tuple(at)))
    factor = 1 / shape(node.args[0])[place] if op_name(node) == "aten::mean" else sp.S.One
    return sp.Abs(summand) if absolute else summand, factor


# --- masks -----------------------------------------------------------------------------------------


def peel(weights: sp.Expr) -> tuple[sp.Expr, Boolean]:
    """The weights as score where the mask holds, and the mask; zero elsewhere, exactly."""
    keep: list[Boolean] = []
    for _ in range(16):
        found = next((f for w in _tests(weights) if (f := _hoisted(weights, w)) is not None), None)
        if found is None:
            break
        weights, condition = found
        keep.append(condition)
    return weights, ex.canon(sp.And(*keep))


def _tests(weights: sp.Expr) -> list[ex.Where]:
    tests = [w for w in weights.atoms(ex.Where) if not w.args[0].has(ex.s)]
    return sorted(tests, key=lambda w: (w.count_ops(), str(w)))


def _hoisted(weights: sp.Expr, test: ex.Where) -> tuple[sp.Expr, Boolean] | None:
    """The weights where a test holds, if they vanish where it does not (or the other way round)."""
    condition, x, y = test.args
    for chosen, other, holds in ((x, y, condition), (y, x, sp.Not(condition))):
        if other.is_number and vanishes(weights.xreplace({test: _limit(other)})):
            return weights.xreplace({test: chosen}), holds
    return None


def _limit(fill: sp.Expr) -> sp.Expr:
    """A fill that absorbs every score is minus infinity."""
    return ex.NEG_INF if fill.is_number and fill <= HUGE else fill


_LIMITS: Mapping[type, Callable[..., sp.Expr]] = {ex.Maximum: sp.Max, ex.Minimum: sp.Min}


def vanishes(weights: sp.Expr) -> bool:
    """Whether an expression, perhaps of infinities, is zero for all finite values of what it loads."""
    loads = {load: sp.Dummy(real=True) for load in weights.atoms(ex.Load)}
    found = weights.xreplace(loads)
    for old, new in _LIMITS.items():
        found = found.replace(old, new)
    return bool(found == 0)


def nonnegative(e: sp.Expr) -> bool:
    """Whether `e >= 0` for certain."""
    if e.is_nonnegative:
        return True
    if isinstance(e, ex.Maximum):
        return any(map(nonnegative, e.args))
    if isinstance(e, (ex.Minimum, sp.Add, sp.Mul)):
        return all(map(nonnegative, e.args))
    if isinstance(e, sp.Pow):
        return bool(nonnegative(e.base) or (e.exp.is_Integer and e.exp % 2 == 0))
    if isinstance(e, sp.log):
        return nonnegative(e.args[0] - 1)
    if isinstance(e, ex.Where):
        return all(map(nonnegative, e.args[1:]))
    return isinstance(e, (sp.exp, sp.Abs))
