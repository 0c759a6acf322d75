"""`scaled_dot_product_attention` with every form of its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.gathers import trailing
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked, split
from attnopt.patterns.operands import Place
from attnopt.patterns.site import Parts, build, frame, width
from attnopt.patterns.sizes import fix
from attnopt.patterns.views import Index, shape
from attnopt.region import Region
from attnopt.spec import EmptyRow


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention that one call of `scaled_dot_product_attention` is."""
    if op_name(node) != "aten::scaled_dot_product_attention":
        return None
    a = arguments(node)
    query, key, values = a["query"], a["key"], a["value"]
    rank = value(node).dim()
    if not shape(query)[-1].is_Integer or not shape(values)[-1].is_Integer:
        fix(query, shape(query)[-1])
        fix(values, shape(values)[-1])
        return Decline("the head width is not known when the graph is captured", node)
    lengths = shape(key)[-2], shape(values)[-2]
    if lengths[0] != lengths[1] and lengths[0].is_Integer and lengths[1].is_Integer:
        return Decline(f"there are {lengths[0]} keys and {lengths[1]} values", node)
    framed = frame(node, rank - 2, rank - 1, shape(key)[-2], shape(query)[-1], None)
    if isinstance(framed, Decline):
        return framed
    framed = replace(framed, alike=frozenset(lengths))
    lifter = Lifter(framed.sizes, constants)
    batch = framed.index[:-2]
    scale = ex.number(a["scale"]) if a["scale"] is not None else 1 / sp.sqrt(shape(query)[-1])
    scale = scale if scale.is_Rational else ex.number(float(scale))
    masked = _masked(a, (*batch, ex.q, ex.k), scale * ex.s, lifter)
    parts = Parts(
        "sdpa", node, node, masked,
        Place(query, operand(query, batch, ex.q, ex.d, None), ex.q, ex.d),
        Place(key, operand(key, batch, ex.k, ex.d, framed.heads if a["enable_gqa"] else None), ex.k, ex.d),
        Place(values, operand(values, batch, ex.k, width, framed.heads if a["enable_gqa"] else None), ex.k, width),
        dropout=float(a["dropout_p"]),
    )  # fmt: skip
    return build(parts, framed, lifter)


def operand(node: fx.Node, batch: Index, position: sp.Symbol, feature: sp.Symbol, heads: int | None) -> Index:
    """Index of an operand that is broadcast to the batch; `heads` where its own heads are repeated to so many."""
    index = list(trailing(node, (*batch, position, feature)))
    own = shape(node)[-3] if len(index) > 2 else sp.S.One
    if heads is not None and own.is_Integer and 1 < own < heads:
        index[-3] = ex.FloorDiv(ex.h, sp.Integer(heads) / own)
    index[-2:] = [position, feature]
    return tuple(index)


def _masked(a: dict[str, object], index: Index, score: sp.Expr, lifter: Lifter) -> Masked:
    """Rows without any kept key give zeros, in every form of the mask."""
    if a["is_causal"]:
        return Masked(score, sp.Le(ex.k, ex.q), EmptyRow.ZERO)
    if a["attn_mask"] is None:
        return Masked(score, sp.true, EmptyRow.ZERO)
    mask = lifter.lift(a["attn_mask"], trailing(a["attn_mask"], index))  # type: ignore[arg-type]
    if value(a["attn_mask"]).dtype == torch.bool:
        return Masked(score, ex.truth(mask), EmptyRow.ZERO)
    found = split(score + mask, lifter.finite)
    return Masked(found.score, found.keep, EmptyRow.ZERO if found.empty_row is EmptyRow.NAN else found.empty_row)
