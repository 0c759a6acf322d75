"""Equal layers are proven once: a proof is carried over to a part of the graph that is the same, node by node.

Two parts are the same if they call the same operators with the same arguments on tensors of the same sizes, strides
and types, as far as the proof has looked, and if what it has looked at and nothing computes is the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.functional import WRITES
from attnopt.graph import op_name, value
from attnopt.patterns.enumerated import mark
from attnopt.patterns.followed import Proof, Read, Value

_Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class Followed:
    """A proof, the nodes that it has looked at, and the probabilities of dropout on its way."""

    proof: Proof
    softmax: fx.Node
    seen: frozenset[fx.Node]
    dropout: tuple[tuple[fx.Node, float], ...]


def carried(done: Followed, softmax: fx.Node, outputs: Sequence[fx.Node]) -> tuple[Proof, dict[fx.Node, float]] | None:
    """The proof for another softmax, and dropout on its way; None where the parts of the graph differ.

    `outputs` are the contraction that applies its weights, and views of that, one after another.
    """
    for output in outputs:
        pairs = _pairs(done, output)
        if pairs is not None and pairs.get(done.softmax) is softmax:
            needed = {*(n for n, _ in done.dropout), *_nodes(done.proof)}
            if needed <= pairs.keys():
                return _proof(done.proof, pairs), {pairs[node]: p for node, p in done.dropout}
    return None


def _nodes(proof: Proof) -> set[fx.Node]:
    """The nodes that a proof names."""
    reads = [*proof.scores.reads, *proof.weights.reads]
    named = {node for node, _ in reads} | {read.node for _, read in reads}
    return named | {proof.product, proof.value.node, *(read.node for read in proof.operands)}


def _pairs(done: Followed, output: fx.Node) -> dict[fx.Node, fx.Node] | None:
    """Every node behind the proof's output with its counterpart behind `output`."""
    pairs: dict[fx.Node, fx.Node] = {}
    queue: list[_Pair] = [(done.proof.output, output)]
    while queue:
        one, other = queue.pop()
        if one in pairs:
            if pairs[one] is not other:
                return None
            continue
        if _about(one) != _about(other):
            return None
        pairs[one] = other
        inner = _arguments(one, other) if one.op == "call_function" and op_name(one) != "aten::detach" else None
        if inner is None and one is not other:
            return None
        # What the proof has not looked at is opaque to it, whatever computes it.
        queue += [(x, y) for x, y in inner or () if x in done.seen]
    return pairs


def _about(node: fx.Node) -> Any:
    """What a node is without its arguments."""
    seen = value(node)
    writes = tuple(node < write for write in node.meta.get(WRITES, ()))
    about = (seen.shape, seen.stride(), seen.dtype, seen.device) if isinstance(seen, torch.Tensor) else str(seen)
    return node.op, node.target if node.op == "call_function" else "", about, writes


def _arguments(one: fx.Node, other: fx.Node) -> list[_Pair] | None:
    """The nodes that two calls take, in pairs; None where other arguments differ."""
    (mine, form), (theirs, shape) = (pytree.tree_flatten((list(n.args), dict(n.kwargs))) for n in (one, other))
    if form != shape:
        return None
    pairs = []
    for x, y in zip(mine, theirs, strict=True):
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            pairs.append((x, y))
        elif type(x) is not type(y) or x != y:
            return None
    return pairs


def _proof(proof: Proof, pairs: dict[fx.Node, fx.Node]) -> Proof:
    """The proof with other nodes."""
    marks = {mark(one): mark(other) for one, other in pairs.items() if isinstance(value(one), torch.Tensor)}

    def read(found: Read) -> Read:
        return replace(found, node=pairs[found.node])

    def moved(found: Value) -> Value:
        reads = tuple((pairs[node], read(at)) for node, at in found.reads)
        return Value(found.expr.xreplace(marks), reads)

    query, key = proof.operands
    return replace(
        proof, output=pairs[proof.output], scores=moved(proof.scores), weights=moved(proof.weights),
        product=pairs[proof.product], operands=(read(query), read(key)), value=read(proof.value),
    )  # fmt: skip
