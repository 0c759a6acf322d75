"""Exact: attentions whose outputs are added to one another become one attention with terms.

Decoupled cross-attention (text plus image keys) and every other sum of attentions of the same queries' shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from attnopt.functional import WRITES
from attnopt.graph import op_name, value
from attnopt.patterns.gates import Dims, views_after
from attnopt.patterns.site import _changed
from attnopt.region import Line, Region

_SIGNS = {"aten::add": 1, "aten::sub": -1}


def join(regions: Iterable[Region]) -> dict[fx.Node, Region]:
    """The sums that can be made of the regions: the anchor of each first term to the whole."""
    waiting = {node: (region, dims) for region in regions for node, dims in (views_after(region),)}
    sums: dict[fx.Node, Region] = {}
    queue = sorted({user for node in waiting for user in node.users})
    while queue:
        node = queue.pop(0)
        parts = [waiting.get(x) for x in node.args[:2]] if op_name(node) in _SIGNS else []
        if len(parts) != 2 or node.args[0] is node.args[1] or parts[0] is None or parts[1] is None:
            continue
        found = _sum(parts[0], parts[1], node)
        if found is None:
            continue
        for x in node.args[:2]:
            sums.pop(waiting.pop(x)[0].anchor, None)
        last, dims = views_after(found)
        waiting[last] = found, dims
        sums[found.anchor] = found
        queue += [user for user in last.users if user not in queue]
    return sums


def _sum(first: tuple[Region, Dims], second: tuple[Region, Dims], node: fx.Node) -> Region | None:
    """The sum of two regions, each seen through views with the given dimensions, as the value of `node`."""
    (left, dims), (right, others) = first, second
    ends = [x for x in node.args[:2] if isinstance(x, fx.Node)]
    alike = {(str(value(x).shape), value(x).dtype) for x in (*ends, node)}
    heads = {(r.spec.heads.q, r.spec.heads.d_v, r.batch) for r in (left, right)}
    alone = all(len(x.users) == 1 and not x.meta.get(WRITES) for x in ends)
    if len(alike) > 1 or len(heads) > 1 or dims != others or not alone or node.kwargs or node.meta.get(WRITES):
        return None
    if any(t.spec.dropout for r in (left, right) for t in r.terms):
        return None
    signed = [_negated(t) if _SIGNS[op_name(node)] < 0 else t for t in right.terms]
    terms = sorted((t.replace(output=node, out_dims=dims) for t in (*left.terms, *signed)), key=lambda t: t.anchor)
    read = {o.node for t in terms for o in (t.query, t.key, t.value, *t.captures.values())}
    if _changed({x.table if isinstance(x, Line) else x for x in read}, node) is not None:
        return None
    claims = left.claims | right.claims | {t.anchor for t in terms} - {terms[0].anchor}
    rewrites = dict.fromkeys((*left.rewrites, *right.rewrites, "add_up"))
    return terms[0].replace(
        merge=tuple(terms[1:]), claims=claims, inner=left.inner | right.inner | {node},
        escapes=(*left.escapes, *right.escapes), rewrites=tuple(rewrites),
    )  # fmt: skip


def _negated(term: Region) -> Region:
    return term.replace(spec=replace(term.spec, gate=-term.spec.gate).canonical())
