"""Plans for sharing key-value heads: which heads to group, measured on calibration inputs, and how to rotate them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import Decline
from attnopt.passes import head_paths
from attnopt.passes.align import Freedom, distances, grouped, rotations
from attnopt.passes.head_paths import Side
from attnopt.passes.merge_heads import Groups, Turns
from attnopt.passes.stage import Stage
from attnopt.patterns.projections import Projections
from attnopt.region import Region


@dataclass(frozen=True, eq=False)
class Alignment:
    """The groups of a site's key-value heads, the rotations before they are averaged, and what limited those."""

    groups: Groups
    turns: Turns | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Moments:
    """`X' X` of the key and of the value features of all heads, over the tokens of the calibration inputs."""

    k: Tensor
    v: Tensor


def moments(stage: Stage, sites: Mapping[str, tuple[Region, Projections]]) -> dict[str, Moments]:
    """The second moments of every site's keys and values as their projections give them, fp64."""
    sums: dict[str, Moments] = {}
    for key, (_, found) in sites.items():
        sizes = (sum(map(len, p.rows)) for p in (found.k, found.v))
        sums[key] = Moments(*(torch.zeros(n, n, dtype=torch.float64) for n in sizes))
    listeners: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, (_, found) in sites.items():
        for p, total in ((found.k, sums[key].k), (found.v, sums[key].v)):
            rows = torch.tensor([r for head in p.rows for r in head])
            listeners.setdefault(p.node.name, []).append((rows, total))

    def probe(name: str) -> Callable[[Any], Any]:
        def listen(x: Tensor) -> Tensor:
            for rows, total in listeners[name]:
                seen = x.detach().flatten(0, -2)[:, rows.to(x.device)].double().cpu()
                total += seen.t() @ seen
            return x

        return listen

    with torch.no_grad():
        for _ in stage.calibration.run(stage.gm, stage.tensors, {name: probe(name) for name in listeners}):
            pass
    return sums


def align(
    stage: Stage, region: Region, found: Projections, count: int, seen: Moments | None, movable: bool
) -> Alignment | Decline:
    """The plan of one site; neighbours are grouped, and nothing is rotated, without moments."""
    try:
        return _align(stage, region, found, count, seen, movable)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        return Decline(f"what happens between projections and attention cannot be run alone: {error}", region.anchor)


def _align(
    stage: Stage, region: Region, found: Projections, count: int, seen: Moments | None, movable: bool
) -> Alignment | Decline:
    if seen is not None and not bool(seen.k.isfinite().all() & seen.v.isfinite().all()):
        return Decline("its keys or values are not finite on the calibration inputs", region.anchor)
    operands = (region.query, region.key, region.value)
    ends = [(p.node, x.node) for p, x in zip((found.q, found.k, found.v), operands, strict=True)]
    *paths, last = head_paths.seen(stage.gm, stage.tensors, stage.calibration, [*ends, (region.output, found.o.input)])
    sides = [
        head_paths.into(path, p.rows, x.dims)
        for path, p, x in zip(paths, (found.q, found.k, found.v), operands, strict=True)
    ]
    for side, role in zip(sides[1:], ("key", "value"), strict=True):
        if not side.uniform():
            return Decline(f"{role} heads differ in what happens to them after their projection", side.path.target)
    heads = region.spec.heads.k
    size = heads // count
    if seen is None:
        groups = tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))
        return Alignment(Groups(groups, movable), None)
    query, key, value = sides
    out = head_paths.out_of(last, found.o.rows, region)
    alike = query.uniform(), out.uniform()
    k_free = _freedom(query, key, head_paths.scores_keep) if alike[0] else Freedom()
    v_free = _freedom(out, value, lambda o, v, r: head_paths.outputs_keep(v, o, r)) if alike[1] else Freedom()
    cost = distances(seen.k, heads, k_free) + distances(seen.v, heads, v_free)
    members = grouped(cost, count)
    turns = Turns(*(rotations(m, heads, members, f) for m, f in ((seen.k, k_free), (seen.v, v_free))))
    remarks = [
        f"its {name} heads are grouped but not rotated, since nothing proves that attention would stay the same"
        for name, free in (("key", k_free), ("value", v_free))
        if not free.size
    ]
    return Alignment(Groups(members, movable and all(alike)), turns, tuple(remarks))


def _freedom(left: Side, right: Side, keeps: Callable[[Side, Side, Tensor], bool]) -> Freedom:
    """The rotations of features that two sides carry through together, tried out."""
    a, b = left.response(), right.response()
    if left.out:
        a = a.transpose(-1, -2)
    if min(len(a), len(b)) < 2:
        return Freedom()  # one position says nothing about others
    found = head_paths.freedom(a, b)
    if not found.size or not keeps(left, right, head_paths.any_rotation(b.shape[-1], found)):
        return Freedom()
    return found
