"""What happens to a head between its projection and attention, tried out on values: which rotations pass unseen.

The operators between a linear map and an operand (RoPE, norms, scales, views) are run alone, in fp64, on values of our
own choice; what else they read (cosines, gains) has the values of a calibration input. A rotation of a head is used
only if scores, or outputs, come out the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes.align import Freedom, nearest
from attnopt.passes.tolerance import Calibration
from attnopt.region import Dim, Region

# Paths may pass through fp32, and what a wrong rotation changes is of the size of the values themselves.
_SAME = 1e-4
_PLACES = 12


@dataclass(frozen=True, eq=False)
class Path:
    """The operators from a node to a node that depends on it, the values of what else they read, the source's shape."""

    source: fx.Node
    target: fx.Node
    nodes: tuple[fx.Node, ...]
    values: Mapping[fx.Node, Any]
    shape: tuple[int, ...]

    def run(self, x: Tensor) -> Tensor:
        """The target's value where the source's is `x`, in fp64 as far as the path allows."""
        known = {**{n: _wide(v) for n, v in self.values.items()}, self.source: x}
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found = known[self.target]
        assert isinstance(found, Tensor)
        return found.double()


def between(source: fx.Node, target: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes on the ways from `source`, which is left out, to `target`, in the graph's order."""
    below: set[fx.Node] = {source}
    queue = [source]
    while queue:
        for user in queue.pop().users:
            if user not in below:
                below.add(user)
                queue.append(user)
    way: set[fx.Node] = set()
    queue = [target]
    while queue:
        node = queue.pop()
        if node in below and node is not source and node not in way:
            way.add(node)
            queue.extend(node.all_input_nodes)
    return tuple(n for n in source.graph.nodes if n in way)


def seen(
    gm: fx.GraphModule, tensors: Mapping[str, Tensor], calibration: Calibration, ends: Sequence[tuple[fx.Node, fx.Node]]
) -> list[Path]:
    """The paths between these ends, with what they read on the first calibration input."""
    ways = [between(*pair) for pair in ends]
    read = [{x for n in way for x in n.all_input_nodes} - set(way) for way in ways]
    held: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any], Any]:
        def probe(x: Any) -> Any:
            held[name] = x.clone() if isinstance(x, Tensor) else x
            return x

        return probe

    wanted = {x.name for leaves in read for x in leaves} | {source.name for source, _ in ends}
    with torch.no_grad():
        next(iter(calibration.run(gm, tensors, {name: keep(name) for name in sorted(wanted)})))
    return [
        Path(source, target, way, {x: held[x.name] for x in leaves}, tuple(held[source.name].shape))
        for (source, target), way, leaves in zip(ends, ways, read, strict=True)
    ]


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@dataclass(frozen=True, eq=False)
class Side:
    """One end of attention: a path, the features of each head at its projection, and how the operand's are read."""

    path: Path
    rows: Sequence[Sequence[int]]
    read: Callable[[Tensor], Tensor]  # the target's value as [places, heads, features]
    write: Callable[[Tensor], Tensor]  # [heads, features] at every place, as the source's value
    out: bool = False  # whether it leads from the attention to the output projection

    def one(self, x: Tensor) -> Tensor:
        """The operand `[places, heads, d']` where each head's features `[heads, d]` are the same at every place."""
        found = self.read(self.path.run(self.write(x)))
        return found[_spread(found.shape[0])]

    def uniform(self) -> bool:
        """Whether every head goes the same way: equal features of heads give equal features of the operand."""
        x = _random(1, len(self.rows[0])).expand(len(self.rows), -1)
        y = self.one(x)
        return bool(_close(y, y[:, :1].expand_as(y)))

    def response(self) -> Tensor:
        """The first head's operand for each of its features alone: `[places, d', d]`."""
        d = len(self.rows[0])
        basis = torch.eye(d, dtype=torch.float64)
        return torch.stack([self.one(e.expand(len(self.rows), -1))[:, 0] for e in basis], -1)


def into(path: Path, rows: Sequence[Sequence[int]], dims: Sequence[Dim]) -> Side:
    """The side of a query, key or value: from the rows of a linear map to an operand with these dimensions."""
    return Side(path, rows, lambda y: _placed(y, dims), lambda x: _features(path.shape, x, rows))


def out_of(path: Path, columns: Sequence[Sequence[int]], region: Region) -> Side:
    """The side of the output: from the attention's output to the columns of the output projection."""
    index = torch.tensor([list(c) for c in columns])

    def read(y: Tensor) -> Tensor:
        return y.reshape(-1, y.shape[-1])[:, index]

    def write(x: Tensor) -> Tensor:
        names = [name for folded in region.out_dims for name in folded]
        heads, d = x.shape
        view = [size for n, f in zip(path.shape, region.out_dims, strict=True) for size in _split(n, f, heads)]
        spread = x.view([heads if name == "h" else d if name == "d" else 1 for name in names])
        return spread.expand(view).reshape(path.shape)

    return Side(path, columns, read, write, out=True)


def scores_keep(q: Side, k: Side, rotations: Tensor) -> bool:
    """Whether scores are the same when a query head and its key head, here the first ones, are rotated alike."""
    a, b = _random(2, len(q.rows), len(q.rows[0])), _random(3, len(k.rows), len(k.rows[0]))
    before = torch.einsum("qd,kd->qk", q.one(a)[:, 0], k.one(b)[:, 0])
    after = torch.einsum("qd,kd->qk", q.one(a @ rotations)[:, 0], k.one(b @ rotations)[:, 0])
    return _close(after, before)


def outputs_keep(v: Side, o: Side, rotations: Tensor) -> bool:
    """Whether the output projection gets the rotated features when a value head, here the first one, is rotated."""
    a = _random(4, len(v.rows), len(v.rows[0]))
    plain, turned = v.one(a)[0, 0], v.one(a @ rotations)[0, 0]
    before, after = (o.one(x.expand(len(o.rows), -1))[:, 0] for x in (plain, turned))
    return _close(after, before @ rotations)


def freedom(left: Tensor, right: Tensor) -> Freedom:
    """The rotations that commute with `left[s]' right[t]` for all places: `left, right [places, d', d]`.

    Features that stand alone and have the same factor everywhere may be mixed at will; a pair whose 2x2 blocks are
    all multiples of rotations may be turned.
    """
    both = torch.einsum("sxi,txj->stij", left, right)
    d, size = both.shape[-1], both.abs().amax().clamp_min(1e-300)
    linked = (both.abs().amax((0, 1)) > 1e-12 * size).tolist()
    parts = _components([[linked[i][j] or linked[j][i] for j in range(d)] for i in range(d)])
    planes, alone = [], []
    for part in parts:
        if len(part) == 1:
            alone.append(part[0])
        elif len(part) == 2:
            a, b = part
            turned = _alike(both[..., a, a], both[..., b, b], size) and _alike(both[..., a, b], -both[..., b, a], size)
            planes += [(a, b)] if turned else []
    free: list[list[int]] = []
    for i in alone:
        same = next((g for g in free if _alike(both[..., i, i], both[..., g[0], g[0]], size)), None)
        if same is None:
            free.append([i])
        else:
            same.append(i)
    return Freedom(tuple(planes), tuple(tuple(g) for g in free if len(g) > 1))


def any_rotation(d: int, allowed: Freedom) -> Tensor:
    """A rotation that uses all the freedom there is, `[d, d]`."""
    return nearest(_random(5, d, d), allowed)


def _components(linked: list[list[bool]]) -> list[list[int]]:
    left, parts = list(range(len(linked))), []
    while left:
        part = [left.pop(0)]
        for i in part:
            part += [j for j in left if linked[i][j]]
            left = [j for j in left if j not in part]
        parts.append(sorted(part))
    return parts


def _alike(a: Tensor, b: Tensor, size: Tensor) -> bool:
    return bool((a - b).abs().amax() <= 1e-6 * size)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().amax() <= _SAME * b.abs().amax())


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _spread(count: int) -> Tensor:
    """Some places of many, the last among them."""
    return torch.linspace(0, count - 1, min(count, _PLACES)).round().long().unique()


def _split(size: int, folded: tuple[str, ...], heads: int) -> tuple[int, ...]:
    """The sizes of the coordinates that a dimension of the output holds: one, or batch and heads."""
    return (size,) if len(folded) == 1 else tuple(heads if name == "h" else size // heads for name in folded)


def _features(shape: tuple[int, ...], x: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """A linear map's output, zero but for the given heads' features at every place."""
    out = torch.zeros(shape, dtype=torch.float64)
    out[..., torch.tensor([list(r) for r in rows]).flatten()] = x.flatten()
    return out


def _placed(y: Tensor, dims: Sequence[Dim]) -> Tensor:
    """An operand as `[places, heads, features]`, of the first batch."""
    for i in reversed(range(len(dims))):
        if dims[i] not in ("h", "q", "k", "d"):
            y = y.select(i, dims[i] if isinstance(dims[i], int) else 0)
    names = [d for d in dims if d in ("h", "q", "k", "d")]
    order = [next(i for i, n in enumerate(names) if n in wanted) for wanted in (("q", "k"), ("h",), ("d",))]
    return y.permute(order)
