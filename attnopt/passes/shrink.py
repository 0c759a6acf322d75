"""Removing heads of one attention from a graph: smaller projections, and everything between them on fewer heads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from attnopt.errors import Decline
from attnopt.graph import arguments, aten, is_call, op_name, value
from attnopt.passes.restrict import Restrictor
from attnopt.patterns.projections import Projection, Projections
from attnopt.patterns.views import pieces
from attnopt.region import Region

Keep = tuple[int, ...]
_SPLITS = ("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split")


@dataclass(frozen=True)
class Cut:
    """What stays of a parameter: `keep` along dimension `dim` of the placeholder's tensor."""

    placeholder: fx.Node
    dim: int
    keep: Keep


def remove(
    gm: fx.GraphModule, region: Region, projections: Projections, removed: Collection[int]
) -> list[Cut] | Decline:
    """Remove query heads, and the key and value heads that no query head uses any more, in place.

    Afterwards the graph takes the smaller parameters that the cuts describe. On a `Decline` it is as before.
    """
    heads = region.spec.heads
    kept = [h for h in range(heads.q) if h not in removed]
    rows = rows_of(projections, kept, {heads.k_map[h] for h in kept}, {heads.v_map[h] for h in kept})
    shrinking = {p.node: p for p in (projections.q, projections.k, projections.v) if len(rows[p.node]) < width(p)}
    restrictor = Restrictor(gm, list(shrinking))
    old, dim = projections.o.input, value(projections.o.input).dim() - 1
    columns = tuple(sorted(c for h in kept for c in projections.o.rows[h]))
    new = restrictor.take(old, dim, columns)
    dead = only_for([old], projections.o.node)
    cuts = leftovers(restrictor, shrinking, rows, dead)
    if isinstance(cuts, Decline):
        restrictor.undo()
        return cuts
    done = [Cut(projections.o.weight, 0 if projections.o.transposed else 1, columns)]
    projections.o.node.replace_input_with(old, new)
    for node, projection in shrinking.items():
        done += shrink(restrictor, projection, rows[node], cuts[node])
    shrink_placeholder(done[0])
    clean(gm.graph, dead | {n for nodes in cuts.values() for n in nodes} | set(shrinking))
    anchor = restrictor.copies.get(region.anchor)
    if anchor is not None and anchor is not region.anchor:
        # The name identifies the site in reports; the old node, which had it, is gone.
        anchor.name = region.anchor.name
        anchor.meta["attnopt_rewrites"] = (*region.anchor.meta.get("attnopt_rewrites", ()), "prune_heads")
    return done


def rows_of(
    projections: Projections, q: Collection[int], k: Collection[int], v: Collection[int]
) -> dict[fx.Node, Keep]:
    """The rows that stay of each linear map, ascending."""
    rows: dict[fx.Node, set[int]] = {}
    for projection, heads in ((projections.q, q), (projections.k, k), (projections.v, v)):
        rows.setdefault(projection.node, set()).update(r for h in heads for r in projection.rows[h])
    return {node: tuple(sorted(found)) for node, found in rows.items()}


def width(projection: Projection) -> int:
    """How many output features a linear map has."""
    return int(value(projection.node).shape[-1])


def only_for(olds: Iterable[fx.Node], consumer: fx.Node | None = None) -> set[fx.Node]:
    """Every node that only `consumer` uses, through its inputs `olds`; without one, that nothing else uses."""
    dead: set[fx.Node] = set()
    queue = list(olds)
    while queue:
        node = queue.pop()
        if node in dead or node.op == "placeholder" or any(u is not consumer and u not in dead for u in node.users):
            continue
        dead.add(node)
        queue.extend(node.all_input_nodes)
    return dead


def leftovers(
    r: Restrictor, shrinking: Iterable[fx.Node], rows: dict[fx.Node, Keep], dead: set[fx.Node], filled: bool = False
) -> dict[fx.Node, list[fx.Node]] | Decline:
    """What still reads each old linear map: cuts of its features that stay whole. Declines for anything else.

    With `filled`, selections may name rows that go: what is computed from them is known not to depend on those.
    """
    cuts: dict[fx.Node, list[fx.Node]] = {}
    for node in shrinking:
        ours = {n for _, n in r.wanted[node]}
        if not filled and any(set(keep) - set(rows[node]) for keep, _ in r.wanted[node]):
            return Decline("a head's rows are used for another head too", node)
        cuts[node] = []
        for user in node.users:
            if user in dead or user in ours:
                continue
            if is_call(user, aten.sym_size.int) and user.args[1] not in (-1, value(node).dim() - 1):
                cuts[node].append(user)
                continue
            for piece in _pieces(user):
                if piece in dead:
                    continue
                covered = _covered(piece, node)
                if covered is None or set(covered) - set(rows[node]):
                    return Decline("a projection of this attention is used in another place too", user)
                cuts[node].append(piece)
    return cuts


def _pieces(user: fx.Node) -> list[fx.Node]:
    return list(user.users) if op_name(user) in _SPLITS else [user]


def _covered(node: fx.Node, linear: fx.Node) -> Keep | None:
    """The features of the linear map that a cut of its last dimension gives, if it is one."""
    last = value(linear).dim() - 1
    if op_name(node) in ("aten::slice", "aten::narrow") and arguments(node)["dim"] % (last + 1) == last:
        a = arguments(node)
        start = a["start"] or 0
        if isinstance(start, int) and a.get("step", 1) == 1:
            start = start + value(linear).shape[last] if start < 0 else start
            return tuple(range(start, start + value(node).shape[last]))
        return None
    found = pieces(node) if node.op == "call_function" and not op_name(node) else None
    if found is None or found[0] is not linear or found[1] != last or not found[2].is_Integer:
        return None
    return tuple(range(int(found[2]), int(found[2]) + value(node).shape[last]))


def shrink(r: Restrictor, projection: Projection, rows: Keep, leftovers: list[fx.Node]) -> list[Cut]:
    """Put the smaller linear map in the place of the old one."""
    node, dim = projection.node, value(projection.node).dim() - 1
    done = [Cut(projection.weight, 1 if projection.transposed else 0, rows)]
    if projection.bias is not None:
        done.append(Cut(projection.bias, 0, rows))
    for cut in done:
        shrink_placeholder(cut)
    small = r.again(node, {})
    place = {row: i for i, row in enumerate(rows)}
    for keep, selection in r.wanted[node]:
        _replace(selection, _at(r, small, dim, tuple(place.get(row, 0) for row in keep)))
    for piece in leftovers:
        if is_call(piece, aten.sym_size.int):
            piece.replace_input_with(node, small)
            continue
        covered = _covered(piece, node)
        assert covered is not None
        _replace(piece, _at(r, small, dim, tuple(place[row] for row in covered)))
    return done


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    for node in (old, *(n for n in old.all_input_nodes if n.op == "get_attr")):
        if not node.users:
            node.graph.erase_node(node)


def _at(r: Restrictor, small: fx.Node, dim: int, places: Keep) -> fx.Node:
    """The smaller map's features at these places."""
    return small if places == tuple(range(value(small).shape[dim])) else r.select(small, dim, places)


def shrink_placeholder(cut: Cut) -> None:
    """The placeholder takes the smaller tensor from now on."""
    seen = value(cut.placeholder)
    shape = list(seen.shape)
    shape[cut.dim] = len(cut.keep)
    cut.placeholder.meta["val"] = seen.new_empty(shape)


def clean(graph: fx.Graph, gone: set[fx.Node]) -> None:
    """Erase what is not used any more; a size that stays in use was moved to the smaller map."""
    waiting = {n for n in gone if not is_call(n, aten.sym_size.int)}
    for node in reversed(list(graph.nodes)):
        if (node in waiting or op_name(node) in _SPLITS) and not node.users:
            graph.erase_node(node)
