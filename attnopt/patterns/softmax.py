"""Softmax attention: a softmax whose argument holds one contraction and whose result enters another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.analysis.plain import weights_of
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns import weights
from attnopt.patterns.applied import Applied, Rows, apply, finish, folded_heads, is_applying
from attnopt.patterns.byhand import quotient
from attnopt.patterns.contraction import CONTRACTIONS, is_contraction
from attnopt.patterns.shifts import unshifted
from attnopt.patterns.views import CASTS, VIEWS, Index, same, shape
from attnopt.region import Region, Weights

SOFTMAX = {"aten::softmax", "aten::_softmax", "aten::special_softmax"}
# What may stand between the weights and the values; whether it changes them is read, not assumed.
BETWEEN = {
    "aten::dropout", "aten::mul", "aten::div", "aten::add", "aten::sub", "aten::masked_fill", "aten::nan_to_num",
    "aten::clamp", "aten::where", *VIEWS, *CASTS,
}  # fmt: skip
# Products that are candidates although their form may turn out to be unknown.
_PRODUCTS = CONTRACTIONS - {"aten::linear", "aten::baddbmm", "aten::addmm"}
_MORE = "the softmax runs over more than the keys whose values are summed"
_NO_PRODUCT = "no contraction of queries and keys makes the scores"
_STEPS = 64
CHANGED = "the weights are changed between the softmax and the values"
# More columns than this beside the keys are no sinks.
_COLUMNS = 8


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention around a softmax; None when the softmax feeds no contraction."""
    if op_name(node) not in SOFTMAX:
        return None
    declined: Decline | None = None
    for output, way in _applied(node):
        folds = (folded_heads(output), None) if value(output).dim() == 3 and is_contraction(output) else (None,)
        for fold in folds:
            found = _read(node, output, way, constants, fold)
            if isinstance(found, Region):
                return found
            declined = found if fold is None and declined is None else declined
    return declined


def _applied(node: fx.Node) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """The contractions that may apply the weights, nearest first; each with the nodes on the way to it."""
    queue, seen = [node], {node}
    while queue:
        current = queue.pop(0)
        for user in current.users:
            if user in seen or not isinstance(value(user), torch.Tensor):
                continue
            if (is_applying(user) or op_name(user) in _PRODUCTS) and _widens(user, seen):
                yield user, seen
            elif op_name(user) in BETWEEN and _carries(user, current):
                seen.add(user)
                queue.append(user)


def _widens(user: fx.Node, way: set[fx.Node]) -> bool:
    """A sum of an elementwise product applies weights only where the product is larger than they are."""
    if op_name(user) != "aten::sum":
        return True
    product = user.args[0]
    return any(x in way and shape(x) != shape(product) for x in product.all_input_nodes)  # type: ignore[union-attr]


def _carries(user: fx.Node, current: fx.Node) -> bool:
    """Whether the user's elements are the current node's, perhaps changed."""
    if user.args and user.args[0] is current:
        return True
    tensors = user.args[1:] if op_name(user) == "aten::where" else user.args
    movable = op_name(user) in ("aten::where", "aten::mul", "aten::add")
    return movable and current in tensors and value(user).shape == value(current).shape


def _read(
    node: fx.Node, output: fx.Node, way: set[fx.Node], constants: Mapping[str, torch.Tensor], fold: int | None
) -> Region | Decline:
    site = apply(output, lambda n: n in way, constants, fold, (node,))
    if isinstance(site, Decline):
        return site if has_product(node) else Decline(_NO_PRODUCT, node)  # a router, whatever its weights multiply
    hearts = [load for load in site.weights.atoms(ex.Load) if load.args[0].name == node.name]
    if len(hearts) != 1:
        return Decline(CHANGED, site.node)
    index, dim = hearts[0].args[1:], arguments(node)["dim"] % len(hearts[0].args[1:])
    offset = index[dim] - ex.k
    over = offset.is_Integer or (index[dim] == 0 and site.frame.single(ex.k))
    if not over or any(i.has(ex.k) for n, i in enumerate(index) if n != dim):
        return Decline("the softmax does not run over the keys", node)
    columns = _columns(node, site, index, dim)
    if isinstance(columns, Decline):
        return columns
    dropout = dict(site.lifter.dropout)
    dtype = value(node.args[0]).dtype
    if not dtype.is_floating_point:
        return Decline(f"the scores are of {dtype}, and attention is fused for floating point numbers", node)
    site.lifter.limit = torch.finfo(dtype).max
    logits = [ex.as_number(site.lifter.lift(node.args[0], i)) for i in (index, *columns)]
    if set(site.lifter.dropout) - set(dropout):
        return Decline("dropout acts on the scores", node)
    if any(is_contraction(site.lifter.nodes.get(x.args[0].name)) for c in logits[1:] for x in c.atoms(ex.Load)):
        return Decline(_MORE, node)
    made = rows(site, hearts[0], logits)
    if made is None:
        return Decline(CHANGED, site.node)
    found = finish(node, output, site, made, dropout)
    return _with_weights(found, node, site, index) if isinstance(found, Region) and made.plain else found


def _with_weights(region: Region, node: fx.Node, site: Applied, index: Index) -> Region:
    """The region, which knows the softmax as its weights if that has the coordinates of a fused attention in order."""
    wanted, sizes = (ex.b, ex.h, ex.q, ex.k), shape(node)
    if site.frame.batch != (ex.b,) or site.frame.fold is not None or len(index) != len(wanted):
        return region
    for place, symbol, size in zip(index, wanted, sizes, strict=True):
        if not same(size, site.frame.extent(symbol)) or not (place == symbol or (place == 0 and size == 1)):
            return region
    return region.replace(weights=Weights(node, weights_of(region.spec).key, region.query, region.key))


def rows(site: Applied, heart: ex.Load, logits: list[sp.Expr]) -> Rows | None:
    """What the softmax is of, and what becomes of its weights, which may be normalised once more."""
    logit, *columns = unshifted(logits, site.lifter)
    logit = sp.expand_mul(logit, deep=False) if isinstance(logit, sp.Mul) else logit
    again = None if columns else quotient(site.weights, site.lifter, {heart: logit})
    logit = logit if again is None else again.logit
    changed = weights.read(site.weights.xreplace({heart: weights.P}) if again is None else again.factor)
    if changed is None or any(x.has(ex.k) for x in columns) or (columns and changed.factor.has(ex.k)):
        return None
    plain = again is None and not columns
    return Rows(lambda x: weights.guarded(x, site.lifter), logit, changed, _sink(columns), plain)


def has_product(node: fx.Node) -> bool:
    """Whether a product of two tensors stands behind the softmax, and not only a map of one."""
    queue, seen = [node.args[0]], {node}
    while queue and len(seen) < _STEPS:
        current = queue.pop(0)
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if is_contraction(current):
            return True
        if op_name(current) != "aten::linear":
            queue += current.all_input_nodes
    return bool(queue)


def _columns(node: fx.Node, site: Applied, index: Index, dim: int) -> list[Index] | Decline:
    """The index of every element of a row beside the keys: columns that take weight and have no value."""
    n_k, whole = site.frame.extent(ex.k), shape(node)[dim]
    offset = index[dim] - ex.k if index[dim] != 0 else sp.S.Zero
    if same(whole, n_k) and offset == 0:
        return []
    more = sp.expand(whole - n_k)
    if not more.is_Integer or not 0 <= offset <= more <= _COLUMNS:
        return Decline(_MORE, node)
    places = [*map(sp.Integer, range(int(offset))), *(n_k + i for i in range(int(offset), int(more)))]
    return [(*index[:dim], place, *index[dim + 1 :]) for place in places]


def _sink(logits: list[sp.Expr]) -> sp.Expr | None:
    """Columns without a value as one logit of the denominator."""
    logits = [x for x in logits if x != ex.NEG_INF]
    if not logits:
        return None
    return logits[0] if len(logits) == 1 else sp.log(sp.Add(*map(sp.exp, logits)))
