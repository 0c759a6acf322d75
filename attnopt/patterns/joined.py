"""One softmax over several sets of keys, each with scores and values of its own, as one attention over all of them.

`softmax(cat(q @ k1.mT, q @ k2.mT)) = cat(p1, p2)` applied as `p1 @ v1 + p2 @ v2` is
`softmax(q @ cat(k1, k2).mT) @ cat(v1, v2)`: global and local keys (ETC, PEGASUS-X). The joined form is written into
the graph beside the source's, in nodes that nothing uses until the site is lowered, and read as any other softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.aliasing import run_fake
from attnopt.errors import Decline
from attnopt.functional import WRITES
from attnopt.graph import arguments, op_name, value
from attnopt.patterns import softmax
from attnopt.patterns.contraction import contract
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import CASTS, Index, shape
from attnopt.region import Region

aten = torch.ops.aten
_BEFORE = {*POINTWISE, *CASTS}
_AFTER = {"aten::dropout", *CASTS}
_STEPS = 12
_WRITTEN = "attnopt_joined"


@dataclass(frozen=True)
class _Sets:
    """The nodes of such a site: scores put behind one another, what changes them, what changes the weights, the sum."""

    scores: fx.Node
    before: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]
    output: fx.Node


def match(node: fx.Node, constants: Mapping[str, torch.Tensor]) -> Region | Decline | None:
    """The attention over all sets of keys; None if the softmax runs over one set."""
    if op_name(node) not in softmax.SOFTMAX or arguments(node)["dim"] % value(node).dim() != value(node).dim() - 1:
        return None
    sets = _sets(node)
    if sets is None:
        return None
    made: list[fx.Node] = []
    try:
        with node.graph.inserting_before(sets.output):
            heart = _write(node, sets, made)
        found = softmax.match(heart, constants) if heart is not None else None
    except NotImplementedError:
        found = None
    if isinstance(found, Region):
        for new in made:
            new.meta[_WRITTEN] = True
        return found.replace(anchor=node, output=sets.output, pattern="joined")
    for new in reversed(made):
        node.graph.erase_node(new)
    return None


def forget(graph: fx.Graph) -> None:
    """Erase what an earlier search wrote into the graph and nothing uses."""
    for node in reversed(list(graph.nodes)):
        if node.meta.get(_WRITTEN) and not node.users:
            graph.erase_node(node)


def _sets(node: fx.Node) -> _Sets | None:
    """The parts of the site, if it has them all and nothing else reads the weights."""
    before, scores = _scores(node)
    if scores is None or any(n.meta.get(WRITES) for n in (scores, *before)):
        return None
    after: list[fx.Node] = []
    current = node
    while len(current.users) == 1 and op_name(next(iter(current.users))) in _AFTER:
        current = next(iter(current.users))
        after.append(current)
    cuts = _cuts(current, [shape(part)[-1] for part in scores.args[0]])  # type: ignore[union-attr]
    products = [next(iter(cut.users)) for cut in cuts if len(cut.users) == 1]
    if len(products) != len(scores.args[0]) or len(products) < 2:  # type: ignore[arg-type]
        return None
    output = _added(products)
    return None if output is None else _Sets(scores, tuple(before), tuple(after), tuple(products), output)


def _scores(node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The operators between the scores that are put behind one another and the softmax, in order; those scores."""
    before: list[fx.Node] = []
    queue = [node.args[0]]
    while queue and len(before) < _STEPS:
        current = queue.pop()
        if not isinstance(current, fx.Node):
            continue
        if op_name(current) == "aten::cat" and shape(current) == shape(node):
            dim = arguments(current)["dim"] % value(current).dim()
            parts = current.args[0]
            return before[::-1], current if dim == value(current).dim() - 1 and len(parts) > 1 else None  # type: ignore[arg-type]
        if op_name(current) in _BEFORE and len(current.users) == 1:
            before.append(current)
            queue.append(next((x for x in current.all_input_nodes if shape(x) == shape(node)), None))  # type: ignore[arg-type]
    return [], None


def _cuts(weights: fx.Node, lengths: Sequence[sp.Expr]) -> list[fx.Node]:
    """The pieces that the weights are cut into at these lengths, in order; empty if they are read in another way."""
    if not all(n.is_Integer for n in lengths):
        return []
    starts = [int(sum(lengths[:i])) for i in range(len(lengths))]
    found: dict[int, fx.Node] = {}
    users = list(weights.users)
    if len(users) == 1 and op_name(users[0]) in ("aten::split_with_sizes", "aten::split"):
        users, rank = list(users[0].users), value(weights).dim()
        if arguments(next(iter(weights.users)))["dim"] % rank != rank - 1:
            return []
    for user in users:
        if user.target is operator.getitem and int(user.args[1]) < len(starts):  # type: ignore[arg-type]
            start = starts[int(user.args[1])]  # type: ignore[arg-type]
        elif (
            op_name(user) == "aten::slice" and arguments(user)["dim"] % value(weights).dim() == value(weights).dim() - 1
        ):
            a = arguments(user)
            start = int(a["start"] or 0) if a["step"] == 1 else -1
        else:
            return []
        if start not in starts or start in found or shape(user)[-1] != lengths[starts.index(start)]:
            return []
        found[start] = user
    return [found[start] for start in starts] if len(found) == len(starts) else []


def _added(products: Sequence[fx.Node]) -> fx.Node | None:
    """The sum of all the products and of nothing else."""
    left, total = set(products[1:]), products[0]
    while left:
        users = list(total.users)
        if len(users) != 1 or op_name(users[0]) != "aten::add" or users[0].kwargs.get("alpha", 1) != 1:
            return None
        other = [x for x in users[0].args if x is not total]
        if len(other) != 1 or other[0] not in left or len(other[0].users) != 1 or shape(other[0]) != shape(total):
            return None
        left.remove(other[0])  # type: ignore[arg-type]
        total = users[0]
    return total


def _write(node: fx.Node, sets: _Sets, made: list[fx.Node]) -> fx.Node | None:
    """The joined form before the sum; the new softmax, or None. `made` collects the nodes."""
    keys = [_operands(part, query=True) for part in sets.scores.args[0]]  # type: ignore[union-attr]
    values = [_operands(part, query=False) for part in sets.products]
    if any(x is None for x in (*keys, *values)) or len({k[0] for k in keys if k}) != 1:
        return None
    sides = [side for _, side, _ in (*keys, *values)]  # type: ignore[misc]
    if any(side.meta.get(WRITES) for side in sides):
        return None

    def call(target: Any, *args: Any) -> fx.Node:
        made.append(node.graph.call_function(target, args))
        with torch.no_grad():
            made[-1].meta["val"] = run_fake(made[-1])
        made[-1].meta |= {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return made[-1]

    def whole(found: Sequence[Any], rank: int, like: fx.Node) -> fx.Node:
        parts = []
        for _, tensor, index in found:
            for place in reversed([i for i, label in enumerate(index) if label == 0]):
                tensor = call(aten.select.int, tensor, place, 0)
            index = [label for label in index if label != 0]
            order = [index.index(m) for m in _marks(rank) if m in index]
            part = call(aten.permute.default, tensor, order)
            for place, mark in enumerate(_marks(rank)):
                part = part if mark in index else call(aten.unsqueeze.default, part, place)
            batch = [
                n if isinstance(n, int) else call(aten.sym_size.int, like, i) for i, n in enumerate(value(like).shape)
            ]
            parts.append(call(aten.expand.default, part, [*batch[:-2], -1, -1]))
        return call(aten.cat.default, parts, -2)

    rank = value(node).dim()
    key = whole(keys, rank, sets.scores)
    scores = call(aten.matmul.default, keys[0][0], call(aten.transpose.int, key, -2, -1))  # type: ignore[index]
    value_ = whole(values, rank, sets.products[0])
    new = {sets.scores: scores}
    for old in (*sets.before, node, *sets.after):
        made.append(node.graph.node_copy(old, lambda n: new.get(n, n)))
        new[old] = made[-1]
    call(aten.matmul.default, made[-1], value_)
    return new[node]


def _marks(rank: int) -> list[sp.Symbol]:
    """Labels of the dimensions of keys or values: the batch's, then position and width."""
    return [*(sp.Symbol(f"o{i}", integer=True, nonnegative=True) for i in range(rank - 2)), ex.k, ex.d]


def _operands(product: Any, query: bool) -> tuple[fx.Node, fx.Node, Index] | None:
    """Of a product with queries or weights in the plain order: that operand, and the other one with its labels."""
    rank = value(product).dim()
    *batch, _, _ = _marks(rank)
    row = sp.Symbol("row", integer=True, nonnegative=True)
    index = (*batch, row, ex.k if query else ex.d)
    found = contract(product, index, ex.d if query else ex.k) if rank > 2 else None
    for first, (other, labels) in (found, found[::-1]) if found else ():
        plain = first[1] == (*batch, row, ex.d if query else ex.k)
        if plain and row not in labels and set(labels) <= {*_marks(rank), sp.S.Zero} and {ex.k, ex.d} <= set(labels):
            return first[0], other, labels
    return None
