"""Lists of the blocks of keys that each tile of queries visits: never an entry for a pair of query and key.

A list is int32 `[B or 1, H or 1, tiles, 2 + n]`: the number of blocks of which every key is kept by every query of the
tile, the number of all blocks, and the blocks in ascending order, those that are kept whole first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis import tables
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL
from attnopt.analysis.coarse import Coarse, coarse
from attnopt.runtime.capturing import capturing
from attnopt.runtime.tables import algebra_on, fill, values
from attnopt.spec import AttentionSpec

Sizes = Mapping[sp.Symbol, int]
_KEPT = 64
# How many masks of data are remembered, and elements of one that are compared.
_SEEN, _COMPARED = 8, 1 << 17


def sizes_of(spec: AttentionSpec, q: Tensor, k: Tensor, scalars: Sequence[int]) -> dict[sp.Symbol, int]:
    """The run-time sizes and scalars of a call by symbol."""
    extents = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    sizes = dict(zip(ex.SIZES, extents, strict=True))
    return sizes | {ex.scalar(n): int(x) for n, x in zip(spec.scalars, scalars, strict=False)}


class Lists:
    """Makes the lists of one mask for tiles of `block[0]` queries by `block[1]` keys.

    Attributes:
        heads: for each row of a list the query heads that share it; empty for one row a query head (or one for all).
        ragged: the last block of keys has fewer of them; a kernel may want it as one that is not kept whole.
    """

    def __init__(
        self, spec: AttentionSpec, block: tuple[int, int], heads: Sequence[Sequence[int]] = (), ragged: bool = False
    ) -> None:
        spec = spec.canonical()
        self.spec, self.block, self.heads, self.ragged = spec, block, tuple(map(tuple, heads)), ragged
        self.coarse, rest = coarse(spec.keep)
        self.plan = tables.plan(rest)
        self.static = not rest.has(ex.Load)
        self.read = {load.args[0].name for load in ex.loads(spec.keep)}
        self.known: dict[Any, Tensor] = {}
        self.seen: dict[Any, tuple[list[Tensor], Tensor]] = {}

    def __call__(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        """The list of these inputs, on their device."""
        sizes = sizes_of(self.spec, q, k, scalars)
        named = {c.name: t for c, t in zip(self.spec.captures, captures, strict=True)}
        if self.coarse or not self.static:
            make = lambda: packed(self.classes(sizes, named, q.device))  # noqa: E731
            data = [t for name, t in named.items() if name in self.read]
            return self._of_data(sizes, data, make) if all(map(_comparable, data)) else make()
        return self._once("list", sizes, q.device, lambda: packed(self.classes(sizes, named, q.device)))

    def _of_data(self, sizes: Sizes, data: list[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """The list that the same data had: the layers of a model share documents and padding.

        Data are compared, not tensors: whoever writes into their memory need not say so.
        """
        key = (*sizes.values(), *[(t.shape, t.dtype) for t in data])
        before, found = self.seen.get(key, ([], None))
        if found is None or not all(map(torch.equal, before, data)):
            found = make()
            if len(self.seen) >= _SEEN:
                self.seen.clear()
            self.seen[key] = [t.clone() for t in data], found
        return found

    def _once(self, what: str, sizes: Sizes, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What these sizes alone decide is made for the first call that has them.

        What is made while a CUDA graph is recorded is the graph's own: nothing is in it before it runs.
        """
        if capturing():
            return make()
        key = (what, tuple(sizes.values()), device)
        if key not in self.known:
            if len(self.known) >= _KEPT:
                self.known.clear()
            self.known[key] = make()
        return self.known[key]

    def rest(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        """The classes of what is not constant on blocks, int8 `[B or 1, H or 1, tiles, blocks]`."""
        sizes = sizes_of(self.spec, q, k, scalars)
        named = {c.name: t for c, t in zip(self.spec.captures, captures, strict=True)}
        make = lambda: self._rest(sizes, named, q.device)  # noqa: E731
        return self._once("classes", sizes, q.device, make) if self.static else make()

    def classes(self, sizes: Sizes, named: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """int8 `[B or 1, H or 1, tiles, blocks]` of `EMPTY`, `PARTIAL`, `FULL`."""
        make = lambda: self._rest(sizes, named, device)  # noqa: E731
        classes = self._once("classes", sizes, device, make) if self.static else make()
        for one in self.coarse:
            classes = torch.minimum(classes, block_classes(one, sizes, named, self.block, device))
        if self.heads and classes.shape[1] > 1:
            classes = torch.cat([_joined(classes[:, list(group)]) for group in self.heads], 1)
        if self.ragged and sizes[ex.n_k] % self.block[1]:
            classes = classes.clone()
            classes[..., -1].clamp_(max=PARTIAL)
        return classes

    def _rest(self, sizes: Sizes, named: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The classes of what is not coarse; where data decides, by the device itself: the host never waits for it."""
        if device.type != "cpu" and (not self.static or capturing()):
            return self._on_device(sizes, named, device)
        filled = fill(self.plan, sizes, named, self.block, device)
        ends = {t: (low.cpu().numpy(), high.cpu().numpy()) for t, (low, high) in filled.ends.items()}
        found = tables.classes(self.plan, ends, sizes, self.block).classes
        return torch.from_numpy(found.copy()).to(device)

    def _on_device(self, sizes: Sizes, named: Mapping[str, Tensor], device: torch.device) -> Tensor:
        filled = fill(replace(self.plan, rows=sp.true), sizes, named, self.block, device)
        found = tables.classes_of(self.plan, filled.ends, sizes, self.block, algebra_on(device)).to(torch.int8)
        tiles = tuple(-(-sizes[n] // x) for n, x in zip((ex.n_q, ex.n_k), self.block, strict=True))
        found = found.reshape((1,) * (4 - found.dim()) + tuple(found.shape))
        return found.expand(*found.shape[:2], *tiles).contiguous()


def _comparable(data: Tensor) -> bool:
    """Whether comparing these data takes less time than a list, and equal ones are the same (0.0 and -0.0 are not)."""
    return data.device.type == "cpu" and not data.is_floating_point() and 0 < data.numel() <= _COMPARED


def block_classes(
    one: Coarse, sizes: Sizes, named: Mapping[str, Tensor], block: tuple[int, int], device: torch.device
) -> Tensor:
    """The classes of one coarse clause, whatever the blocks of its map are."""
    kept = values(one.condition, sizes, named, device, (one.rows, one.keys))
    classes = kept.to(torch.int8) * FULL
    for dim, step, width, size in ((2, one.rows, block[0], sizes[ex.n_q]), (3, one.keys, block[1], sizes[ex.n_k])):
        unit = math.gcd(step, width)
        if step > unit:
            classes = classes.repeat_interleave(step // unit, dim)
        classes = classes.narrow(dim, 0, -(-size // unit))
        if width > unit:
            extra = -classes.shape[dim] % (width // unit)
            last = classes.narrow(dim, classes.shape[dim] - 1, 1)
            if extra:
                shape = [-1] * 4
                shape[dim] = extra
                classes = torch.cat([classes, last.expand(shape)], dim)
            classes = _joined(classes.unflatten(dim, (-1, width // unit)), dim + 1).squeeze(dim + 1)
    return classes


def _joined(classes: Tensor, dim: int = 1) -> Tensor:
    """The class of several together: empty or full only if all of them are."""
    low, high = classes.amin(dim, keepdim=True), classes.amax(dim, keepdim=True)
    return torch.where(low == high, low, torch.full_like(low, PARTIAL))


def packed(classes: Tensor) -> Tensor:
    """The list of these classes."""
    full, partial = classes == FULL, classes == PARTIAL
    whole = full.sum(-1, keepdim=True, dtype=torch.int32)
    count = whole + partial.sum(-1, keepdim=True, dtype=torch.int32)
    most = int(count.max()) if classes.device.type == "cpu" else classes.shape[-1]  # no waiting for a device
    place = torch.where(full, full.cumsum(-1) + 1, partial.cumsum(-1) + whole + 1)
    place = place.masked_fill_(classes == EMPTY, 0)  # what is not visited is written where the count will stand
    blocks = torch.arange(classes.shape[-1], dtype=torch.int32, device=classes.device).expand(classes.shape)
    found = torch.zeros((*classes.shape[:-1], 2 + most), dtype=torch.int32, device=classes.device)
    found.scatter_(-1, place, blocks)
    found[..., 0:1], found[..., 1:2] = whole, count
    return found


# Pairs of queries and keys from which a list is worth its own cost, where it is made at every call.
_PAIRS = 1 << 22
# How many more tiles the range of keys of a tile must hold than there are to visit.
_WASTE = 1.15


# Pairs from which a list is worth some dozens of small operators of a device, at 0.2 to 0.3 ms, at every call.
_PAIRS_OF_DATA = 1 << 28


def apart(made: Lists, sizes: Sizes) -> bool:
    """Whether data of queries and of keys keeps so many pairs apart, as documents do, that classing tiles is little."""
    pairs = sizes[ex.n_b] * sizes[ex.n_h] * sizes[ex.n_q] * sizes[ex.n_k]
    return pairs >= _PAIRS_OF_DATA and {"q", "k"} <= {t.axis for t in made.plan.tables}


def pay(spec: AttentionSpec, sizes: Sizes, block: tuple[int, int] = (64, 64)) -> bool:
    """Whether a list of blocks saves more than it costs: the one range that coordinates give holds empty tiles.

    A mask that depends on data is taken to have empty tiles if blocks can be classed by small tables.
    """
    if spec.keep == sp.true or spec.rows != sp.true:
        return False
    found, rest = coarse(spec.canonical().keep)
    if found:
        return sizes[ex.n_k] > block[1]
    pairs = sizes[ex.n_b] * sizes[ex.n_h] * sizes[ex.n_q] * sizes[ex.n_k]
    if sizes[ex.n_q] <= block[0] or pairs < _PAIRS:
        return False
    plan = tables.plan(rest)
    if rest.has(ex.Load):
        return any(t.axis for t in plan.tables)
    classes = tables.classes(plan, {}, sizes, block).classes
    kept = classes != EMPTY
    some = kept.any(-1)
    span = kept.shape[-1] - kept.argmax(-1) - kept[..., ::-1].argmax(-1)
    return bool((span * some).sum() > _WASTE * kept.sum())
