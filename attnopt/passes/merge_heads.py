"""Sharing key and value heads of one attention: its weights rotated and averaged, its graph on fewer heads."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.errors import Decline
from attnopt.graph import aten, is_call, op_name, value
from attnopt.passes.head_paths import between
from attnopt.passes.restrict import Restrictor
from attnopt.passes.shrink import Cut, clean, leftovers, only_for, rows_of, shrink, width
from attnopt.patterns.projections import Projection, Projections
from attnopt.patterns.views import CASTS, VIEWS
from attnopt.region import Operand, Region
from attnopt.spec import Heads


@dataclass(frozen=True)
class Groups:
    """Which key-value heads become one.

    Attributes:
        members: the heads of each group, ascending.
        moved: whether heads change places, so that groups are neighbours; else a table says which group a head has.
    """

    members: tuple[tuple[int, ...], ...]
    moved: bool

    @property
    def order(self) -> tuple[int, ...]:
        """At each place the head that comes there."""
        flat = tuple(h for group in self.members for h in group)
        return flat if self.moved else tuple(range(len(flat)))

    @property
    def table(self) -> tuple[int, ...]:
        """The group of the head at each place."""
        if self.moved:
            return tuple(g for g, group in enumerate(self.members) for _ in group)
        return tuple(next(g for g, group in enumerate(self.members) if h in group) for h in self.order)

    @property
    def kept(self) -> tuple[int, ...]:
        """The place of each group's first head, which holds the group from now on; ascending."""
        return tuple(self.table.index(g) for g in range(len(self.members)))

    def queries(self, heads: Heads) -> tuple[int, ...]:
        """At each place the query head that comes there: query heads follow their keys."""
        by_key: dict[int, list[int]] = {}
        for h, k in enumerate(heads.k_map):
            by_key.setdefault(k, []).append(h)
        taken = {place: iter(by_key.get(h, ())) for place, h in enumerate(self.order)}
        return tuple(next(taken[k]) for k in heads.k_map)


@dataclass(frozen=True)
class Turns:
    """The rotation of each key and each value head, `[heads, d, d]`, by the heads' numbers before they move."""

    k: Tensor
    v: Tensor


def weights(
    found: Projections, heads: Heads, groups: Groups, turns: Turns | None, held: Mapping[fx.Node, Tensor], merge: bool
) -> dict[fx.Node, Tensor]:
    """New values of the parameters, of the sizes they have: heads moved and rotated, then each group's mean.

    The mean stands in the rows of the group's first place. `held` gives the parameters by placeholder.
    """
    old = {node: tensor.detach().double() for node, tensor in held.items()}
    new = {node: tensor.clone() for node, tensor in old.items()}
    order, queries = groups.order, groups.queries(heads)
    for p, source, turn in (
        (found.q, queries, None if turns is None else turns.k[list(heads.k_map)]),
        (found.k, order, None if turns is None else turns.k),
        (found.v, order, None if turns is None else turns.v),
        (found.o, queries, None if turns is None else turns.v[list(heads.v_map)]),
    ):
        for place, h in enumerate(source):
            _move(p, old, new, h, place, None if turn is None else turn[h], features=1 if p is found.o else 0)
    for p in (found.k, found.v) if merge else ():
        for first in groups.kept:
            places = [i for i, g in enumerate(groups.table) if g == groups.table[first]]
            for node in _parameters(p):
                rows = _rows(new[node], p, 0)
                rows[list(p.rows[first])] = torch.stack([rows[list(p.rows[i])] for i in places]).mean(0)
    return {node: tensor.to(held[node].dtype) for node, tensor in new.items()}


def _move(
    p: Projection, old: Mapping[fx.Node, Tensor], new: Mapping[fx.Node, Tensor], source: int, place: int,
    turn: Tensor | None, features: int,
) -> None:  # fmt: skip
    """Rows (or, for the output projection, columns) of a head to another place, rotated: `x -> x Q` for its values."""
    for node in _parameters(p) if features == 0 else (p.weight,):
        part = _rows(old[node], p, features)[list(p.rows[source])]
        _rows(new[node], p, features)[list(p.rows[place])] = part if turn is None else turn.t() @ part


def _parameters(p: Projection) -> tuple[fx.Node, ...]:
    return (p.weight,) if p.bias is None else (p.weight, p.bias)


def _rows(tensor: Tensor, p: Projection, features: int) -> Tensor:
    """A view of a parameter with the features that heads own first: rows of `[out, in]`, columns with `features=1`."""
    if tensor.dim() == 1:
        return tensor
    return tensor.t() if p.transposed != bool(features) else tensor


def share(gm: fx.GraphModule, region: Region, found: Projections, groups: Groups) -> list[Cut] | Decline:
    """Let keys and values be made once a group, in place; a repeat gives them to the group's heads again.

    Recognition reads the repeat as a head map. Afterwards the graph takes the smaller parameters that the cuts
    describe. On a `Decline` it is as before.
    """
    rows = rows_of(found, range(region.spec.heads.q), groups.kept, groups.kept)
    shrinking = {p.node: p for p in (found.q, found.k, found.v) if len(rows[p.node]) < width(p)}
    through = set(between(found.q.node, region.query.node)) | {found.q.node} if found.q.node in shrinking else set()
    r = Restrictor(gm, list(shrinking), through)
    before = set(gm.graph.nodes)
    swaps = [(operand.node, _shared(r, operand, groups)) for operand in (region.key, region.value)]
    if through:
        place = region.query.dims.index("h")
        swaps.append((region.query.node, r.take(region.query.node, place, tuple(range(region.spec.heads.q)))))
    done = _swap(region, swaps, before) + _resize(
        r, [n for p in shrinking for old, _ in swaps for n in between(p, old)]
    )
    dead = only_for([old for old, _ in swaps])
    cuts = leftovers(r, shrinking, rows, dead, filled=True)
    if isinstance(cuts, Decline):
        for user, old, new in reversed(done):
            user.replace_input_with(new, old)
        r.undo()
        return cuts
    made = [cut for node, p in shrinking.items() for cut in shrink(r, p, rows[node], cuts[node])]
    clean(gm.graph, dead | {n for nodes in cuts.values() for n in nodes} | set(shrinking))
    region.anchor.meta["attnopt_rewrites"] = (*region.anchor.meta.get("attnopt_rewrites", ()), "share_kv")
    return made


def _shared(r: Restrictor, operand: Operand, groups: Groups) -> fx.Node:
    dim = operand.dims.index("h")
    few = r.take(operand.node, dim, groups.kept)
    return r.spread(few, dim, groups.table, len(groups.kept))


Swap = tuple[fx.Node, fx.Node, fx.Node]


def _swap(region: Region, swaps: list[tuple[fx.Node, fx.Node]], before: Set[fx.Node]) -> list[Swap]:
    """Give the attention its new operands, where nodes from `before` read the old ones, which make the new ones.

    Returns what was changed: user, old input, new input.
    """
    done = []
    for old, new in swaps:
        for user in list(old.users):
            if user in before and _inside(region, user):
                user.replace_input_with(old, new)
                done.append((user, old, new))
    return done


def _inside(region: Region, node: fx.Node) -> bool:
    """Whether a node is part of the attention, or a view that only the attention uses."""
    if node is not region.output and (op_name(node) in VIEWS or op_name(node) in CASTS):
        return bool(node.users) and all(_inside(region, user) for user in node.users)
    return node is region.output or node in region.inner


def _resize(r: Restrictor, nodes: list[fx.Node]) -> list[Swap]:
    """Sizes that were read off the old operands, positions say, are read off the new ones where they are the same."""
    done = []
    for node in nodes:
        copy = r.copies.get(node)
        for user in list(node.users) if copy is not None and copy is not node else ():
            if is_call(user, aten.sym_size.int) and _size(node, user) == _size(copy, user):
                user.replace_input_with(node, copy)
                done.append((user, node, copy))
    return done


def _size(node: fx.Node | None, user: fx.Node) -> str:
    seen, dim = value(node), user.args[1]
    return str(seen.shape[dim]) if -seen.dim() <= dim < seen.dim() else ""
