"""The contraction that applies the weights, and the site that is built around it once its rows are understood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import op_name, value
from attnopt.patterns.contraction import Side, contract, extent, is_contraction, lengths, operands, pair
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked
from attnopt.patterns.operands import Place, walk
from attnopt.patterns.site import Frame, Parts, build, frame, width
from attnopt.patterns.sizes import fix
from attnopt.patterns.views import shape
from attnopt.patterns.weights import Weights, settle
from attnopt.region import Region
from attnopt.spec import Softmax

NO_DIMENSIONS = "the output has no single query dimension and no single value dimension"


@dataclass(frozen=True)
class Applied:
    """A contraction at its coordinates: `weights` at key `k`, with whatever else is multiplied in, and the values."""

    contraction: fx.Node
    frame: Frame
    lifter: Lifter
    weights: sp.Expr
    node: fx.Node
    values: Side


@dataclass(frozen=True)
class Rows:
    """How the rows of a site are made: the mask and score of a logit over loads, the sink, what the weights become.

    `plain`: the anchor's own values are the weights.
    """

    masked: Callable[[sp.Expr], Masked]
    logit: sp.Expr
    weights: Weights
    sink: sp.Expr | None = None
    plain: bool = True


def apply(
    output: fx.Node, holds: Callable[[fx.Node], bool], constants: Mapping[str, torch.Tensor], fold: int | None,
    stops: Iterable[fx.Node] = (),
) -> Applied | Decline:  # fmt: skip
    """Open the contraction `output`. `holds` tells of an operand whether it is the weights."""
    dims = sides(output, holds)
    if isinstance(dims, Decline):
        return dims
    query_dim, width_dim, weights_at, values_at = dims
    framed = frame(output, query_dim, width_dim, extent(output), sp.S.Zero, fold)
    if isinstance(framed, Decline):
        return framed
    framed = replace(framed, alike=lengths(output))
    lifter = Lifter(framed.sizes, constants)
    lifter.stops.update(stops)
    found = operands(output, framed.index, ex.k)
    values = found.pop(values_at)
    weights = [ex.as_number(lifter.lift(*side)) for side in found]
    node = operands(output, framed.index, ex.k)[weights_at][0]
    return Applied(output, framed, lifter, sp.Mul(*weights), node, values)


def sides(output: fx.Node, holds: Callable[[fx.Node], bool]) -> tuple[int | None, int, int, int] | Decline:
    """The output's dimensions of query position (if any) and value width; the places of weights and values."""
    marks = tuple(sp.Symbol(f"o{i}", integer=True, nonnegative=True) for i in range(value(output).dim()))
    found = operands(output, marks, ex.k)
    if not found:
        return Decline("the contraction that applies the weights has a form that is not known", output)
    held = [place for place, side in enumerate(found) if holds(side[0])]
    if len(held) == len(found):
        return Decline("both operands of the contraction come from the softmax", output)
    if len(held) != 1:
        return Decline("the way from the softmax to the values is not known", output)
    weights = found[held[0]]
    others = set(marks) - set(weights[1])
    own = [place for place, side in enumerate(found) if place != held[0] and set(side[1]) & others]
    if len(own) != 1 or ex.k not in found[own[0]][1]:
        return Decline(NO_DIMENSIONS, output)
    values, sizes = found[own[0]], shape(output)
    left = [i for i, m in enumerate(marks) if m in weights[1] and m not in values[1]]
    right = [i for i, m in enumerate(marks) if m in values[1] and m not in weights[1]]
    # A batch dimension that one operand broadcasts looks like its own; the trailing one is the true one.
    left = [i for i in left if i >= len(marks) - 2 or sizes[i] != 1][-1:] if len(left) > 1 else left
    if len(left) > 1 or not right:
        return Decline(NO_DIMENSIONS, output)
    return left[0] if left else None, right[-1], held[0], own[0]


def finish(
    anchor: fx.Node, output: fx.Node, site: Applied, rows: Rows, dropout: Mapping[fx.Node, float],
    known: Mapping[str, tuple[Place, Place]] | None = None,
) -> Region | Decline:  # fmt: skip
    """Pick the contraction that is `s` in the logit, and build the region.

    `known` gives query and key of contractions by name where their own indices do not tell.
    """
    declined: Decline | None = None
    for load in sorted(rows.logit.atoms(ex.Load), key=str):
        places = products(load, site) if known is None else known.get(load.args[0].name)
        if places is None:
            continue
        masked = rows.masked(rows.logit.xreplace({load: ex.s}))
        settled = settle(rows.weights, masked, site.lifter)
        if isinstance(settled, str):
            return Decline(settled, site.node)
        masked, factor = settled
        gate, weight = (sp.S.One, factor.xreplace({load: ex.s})) if factor.has(ex.k) else (factor, sp.S.One)
        if rows.sink is not None and rows.sink.has(load):
            return Decline("the scores enter the weights once more, beside the softmax", site.node)
        dropped = 1 - math.prod(1 - p for p in dropout.values())
        product = site.lifter.nodes[load.args[0].name]
        parts = Parts(
            "softmax", anchor, output, masked, *places, Place(*site.values, ex.k, width), gate, dropped, product,
            Softmax(rows.sink), weight,
        )  # fmt: skip
        region = build(parts, site.frame, site.lifter)
        if isinstance(region, Region):
            return _own_mask(region, dropout)
        declined = declined or region
    return declined or Decline("no contraction of queries and keys makes the scores", anchor)


def _own_mask(region: Region, dropout: Iterable[fx.Node]) -> Region | Decline:
    """The region, unless weights are used elsewhere after dropout: its mask would be another one there."""
    queue, escapes = list(dropout), set(region.escapes)
    while queue:
        node = queue.pop()
        if str(node) in escapes:
            return Decline("weights are also used elsewhere after dropout, under the same mask", node)
        queue += [user for user in node.users if user in region.inner]
    return region


def products(load: ex.Load, site: Applied) -> tuple[Place, Place] | None:
    """Query and key of the product that a load is; None if it is no such product."""
    made = site.lifter.nodes[load.args[0].name]
    found = pair(made, load.args[1:], ex.d) if isinstance(made, fx.Node) else None
    dtype = value(made).dtype if found is not None else torch.int64
    for operand, _ in found or ():
        fix(operand, extent(made))
    if found is None or not extent(made).is_Integer or not (dtype.is_floating_point or dtype.is_complex):
        return None  # (a sum of integer products makes an index)
    key, query = found if _over(found[0], ex.k) or _over(found[1], ex.q) else found[::-1]
    # A single key or query leaves no trace in an index: its one position is 0.
    if not (_over(key, ex.k) or site.frame.single(ex.k)) or _over(query, ex.k):
        return None
    if ("q",) not in site.frame.dims and any(not _over(key, b) and not site.frame.single(b) for b in site.frame.batch):
        return None
    site.frame.sizes.sizes[ex.d] = extent(made)
    return Place(*query, ex.q, ex.d), Place(*key, ex.k, ex.d)


def _over(side: Side, symbol: sp.Symbol) -> bool:
    return any(i.has(symbol) for i in side[1])


def folded_heads(output: fx.Node) -> int | None:
    """The number of heads that a three-dimensional contraction carries in its batch, read off the views around it."""
    framed = frame(output, 1, 2, extent(output), sp.S.Zero, None)
    if isinstance(framed, Decline) or not framed.batch:
        return None
    lifter = Lifter(framed.sizes)
    for side in contract(output, framed.index, ex.k) or ():
        for _, index, _ in walk(Place(*side, ex.k, width), lifter):
            for part in index:
                for found in part.atoms(ex.Mod, ex.FloorDiv):
                    if found.args[0] == framed.batch[0] and found.args[1].is_Integer:
                        return int(found.args[1])
    return None


def is_applying(node: fx.Node) -> bool:
    """Whether the node may apply weights: a sum of products to which nothing else is added."""
    return op_name(node) not in ("aten::baddbmm", "aten::addmm") and is_contraction(node)
