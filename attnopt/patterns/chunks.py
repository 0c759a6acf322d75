"""Attention over overlapping chunks: scores are laid out by distance or by chunk, and not by query and key.

Longformer's way (Beltagy et al., 2020): keys are cut into overlapping chunks, products of whole chunks are sheared by
a pad and a view of another width so that diagonals become columns, strips of that are written into a buffer, its
corners are masked, and after the softmax all of it happens backwards. Each step moves elements and computes nothing,
so the site is proven by following every element (`followed`), and is then an ordinary attention with a band as its
mask. Equal layers are followed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import op_name, value
from attnopt.patterns import softmax
from attnopt.patterns.alike import Followed, carried
from attnopt.patterns.applied import Applied, finish, is_applying
from attnopt.patterns.contraction import extent, is_contraction
from attnopt.patterns.enumerated import mark
from attnopt.patterns.followed import Proof, Read, Value, prove, views_of
from attnopt.patterns.grids import Unproven
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import absorbed
from attnopt.patterns.memo import kept
from attnopt.patterns.operands import Place
from attnopt.patterns.site import frame
from attnopt.patterns.traces import RULES
from attnopt.patterns.views import shape
from attnopt.region import Region

_HALF = (torch.float16, torch.bfloat16)


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention around a softmax of chunks; None when no layout of chunks stands before a contraction."""
    found = _applied(node) if op_name(node) in softmax.SOFTMAX else None
    if found is None or not softmax.has_product(node):
        return None
    lifter = Lifter(Sizes({}), constants)
    lifter.limit = torch.finfo(value(node.args[0]).dtype).max
    try:
        return _region(node, _proven(node, *found, lifter), lifter)
    except Unproven as error:
        return Decline(f"the layout of the scores is not understood: {error}", node)


def _proven(node: fx.Node, applying: fx.Node, way: set[fx.Node], lifter: Lifter) -> Proof:
    """The proof, that of an equal layer where one was found before. Raises `Unproven`."""
    done = kept("chunks")
    for earlier in done:
        again = carried(earlier, node, tuple(views_of(applying)))
        if again is not None:
            lifter.dropout.update(again[1])
            return again[0]
    proof, seen = prove(node, applying, way, lifter)
    done.append(Followed(proof, node, seen, tuple(lifter.dropout.items())))
    return proof


def _applied(node: fx.Node) -> tuple[fx.Node, set[fx.Node]] | None:
    """The nearest contraction that applies weights which were laid out anew, and the nodes on the way to it."""
    queue, seen, moved = [node], {node}, set[fx.Node]()
    while queue:
        current = queue.pop(0)
        for user in current.users:
            if user in seen or not isinstance(value(user), torch.Tensor):
                continue
            if is_applying(user) and is_contraction(user):
                if current in moved:
                    return user, seen
            elif op_name(user) in softmax.BETWEEN or op_name(user) in RULES:
                seen.add(user)
                queue.append(user)
                if current in moved or op_name(user) not in softmax.BETWEEN:
                    moved.add(user)
    return None


def _region(node: fx.Node, proof: Proof, lifter: Lifter) -> Region | Decline:
    """The region of a proven site."""
    n_k = shape(proof.value.node)[proof.value.index.index(ex.k)]
    framed = frame(proof.output, proof.query, proof.width, n_k, sp.S.Zero, None)
    if isinstance(framed, Decline):
        return framed
    lifter.sizes.sizes.update({**framed.sizes.sizes, ex.d: extent(proof.product)})
    framed = replace(framed, sizes=lifter.sizes)
    names = dict(zip(proof.symbols, framed.index, strict=True))

    def named(read: Read) -> tuple[sp.Expr, ...]:
        return tuple(x.xreplace(names) for x in read.index)

    def lifted(found: Value) -> sp.Expr:
        expr = found.expr
        for source, read in found.reads:
            element, own = lifter.lift(read.node, named(read)), mark(source)
            truth = ex.truth(element)
            expr = expr.xreplace({sp.Ne(own, 0): truth, sp.Eq(own, 0): sp.Not(truth)})
            expr = expr.xreplace({own: ex.as_number(element)})
        return expr

    heart, product = (ex.load(x.name, ex.q, ex.k) for x in (node, proof.product))
    lifter.nodes |= {x.name: x for x in (node, proof.product)}
    logit = _rounded(lifted(proof.scores).xreplace({mark(proof.product): product}), value(node.args[0]).dtype)
    logit = ex.Where(proof.keep.xreplace(names), logit, ex.NEG_INF)
    weights, values = lifted(proof.weights).xreplace({mark(node): heart}), (proof.value.node, named(proof.value))
    site = Applied(proof.output, framed, lifter, weights, node, values)
    rows = softmax.rows(site, heart, [logit])
    if rows is None:
        return Decline(softmax.CHANGED, node)
    query, key = proof.operands
    sides = Place(query.node, named(query), ex.q, ex.d), Place(key.node, named(key), ex.k, ex.d)
    found = finish(node, proof.output, site, rows, lifter.dropout, {proof.product.name: sides})
    return found.replace(pattern="chunks") if isinstance(found, Region) else found


def _rounded(logit: sp.Expr, dtype: torch.dtype) -> sp.Expr:
    """The logit with what a sum in sixteen bits does to a score below a fill. Raises `Unproven` inside of others."""
    if dtype not in _HALF:
        return logit
    if isinstance(logit, sp.Add):
        return absorbed(logit, torch.finfo(dtype).eps)
    if any(x.is_number and x < -1 for where in logit.atoms(ex.Where) for x in where.args[1:]):
        raise Unproven("sums of scores and fills in sixteen bits are computed with")
    return logit
