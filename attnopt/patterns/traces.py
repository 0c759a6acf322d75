"""Where elements come from: every element of a node over a grid, as a number or as the element of an earlier node.

Beside views (see `grids`), operators are read that join parts (pads, concatenations, writes into slices, selections
by masks that the graph itself makes): the grid is then split by which part an element is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from attnopt.functional import WRITES
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.gathers import trailing
from attnopt.patterns.grids import MOST, Array, Grid, Unproven, combined, plain, strided
from attnopt.patterns.known import Known
from attnopt.patterns.lift import Lifter

_FILLS = {
    "aten::new_zeros": 0, "aten::zeros_like": 0, "aten::new_ones": 1, "aten::ones_like": 1, "aten::new_full": None,
    "aten::full_like": None,
}  # fmt: skip
_STEPS, _MOST_VALUES = 4000, 4
# A part of a grid: where it holds, and the node (or number) with the index at which its elements are read.
Part = tuple[Array, Any, tuple[Any, ...]]


@dataclass(frozen=True)
class Piece:
    """Where `holds`: a number, or the element of a node. `way` are nodes and indices passed, the node's own last."""

    holds: Array
    number: float | None
    way: tuple[tuple[fx.Node, tuple[Any, ...]], ...] = ()

    @property
    def node(self) -> fx.Node:
        """What the element is of, where it is no number."""
        return self.way[-1][0]

    @property
    def index(self) -> tuple[Any, ...]:
        """Where in the node it is."""
        return self.way[-1][1]


class _Constants(Known):
    """Tensors that are made of nothing but numbers and sizes."""

    @property
    def looked(self) -> set[fx.Node]:
        """The nodes whose values were asked for and are known."""
        return {node for node, found in self._values.items() if found is not None}

    def _compute(self, node: fx.Node, steps: list[int]) -> Any:
        name, seen = op_name(node), value(node)
        if name not in _FILLS or not all(isinstance(n, int) for n in seen.shape):
            return super()._compute(node, steps)
        fill = arguments(node)["fill_value"] if _FILLS[name] is None else _FILLS[name]
        if not isinstance(fill, (bool, int, float)) or math.prod(seen.shape) > 1 << 24:
            return None
        return torch.full(tuple(seen.shape), fill, dtype=seen.dtype)


class Tracer:
    """Follows elements back through a graph whose sizes are numbers. `ends` are nodes at which it stops.

    `seen` are the nodes that it has looked at.
    """

    def __init__(self, ends: tuple[fx.Node, ...] = ()) -> None:
        self.seen: set[fx.Node] = set()
        self.ends = set(ends)
        self.lifter = Lifter(Grid())
        self.constants = _Constants({})
        self.steps = _STEPS

    def pieces(self, node: Any, index: tuple[Any, ...], holds: Array) -> list[Piece]:
        """The elements of `node` at `index` where `holds`. Raises `Unproven`."""
        found, work = [], [(holds, node, tuple(index), ())]
        while work:
            holds, node, index, way = work.pop()
            self.steps -= 1
            if self.steps < 0:
                raise Unproven(f"more than {_STEPS} parts of tensors stand around the softmax")
            if not holds.any():
                continue
            if not isinstance(node, fx.Node):
                found.append(Piece(holds, float(node)))
                continue
            way = (*way, (node, index))
            self.seen.add(node)
            parts = None if node in self.ends else self._parts(node, index, holds)
            if parts is None:
                found.append(Piece(holds, None, way))
            else:
                work += [(part, inner, tuple(at), way) for part, inner, at in parts]
        return found

    def _parts(self, node: fx.Node, index: tuple[Any, ...], holds: Array) -> list[Part] | None:
        """What the node's elements are, one operator back; None if it computes them."""
        seen = value(node)
        if not isinstance(seen, torch.Tensor) or any(node < write for write in node.meta.get(WRITES, ())):
            return None
        if any(not isinstance(n, int) for n in seen.shape):
            raise Unproven("sizes are not known when the graph is captured")
        if seen.numel() >= 1 << 31:
            raise Unproven(f"{node} has more elements than can be followed")
        if op_name(node) in RULES:
            found = RULES[op_name(node)](self, node, arguments(node), index, holds)
            found = None if found is None else list(found)
            if found is not None and all(_same_type(x, seen.dtype) for _, x, _ in found):
                return found
        elif op_name(node) != "aten::roll":
            moved = self.lifter.step(node, index)
            if moved is not None:
                return [(holds, *moved)]
        table = self.constants.tensor(node)
        return None if table is None else _valued(table, index, holds)


def _valued(table: torch.Tensor, index: tuple[Any, ...], holds: Array) -> list[Part] | None:
    """A tensor that is known, by its few values."""
    if table.is_complex() or table.dim() != len(index) or not table.numel() or bool(table.isnan().any()):
        return None
    values = [x.item() for x in table.unique()]
    if len(values) == 1:
        return [(holds, values[0], ())]
    for dim in range(table.dim()):  # what repeats along a dimension does not depend on the index there
        if bool((table == table.narrow(dim, 0, 1)).all()):
            table = table.narrow(dim, 0, 1)
    places = [np.clip(plain(i), 0, n - 1) if n > 1 else 0 for i, n in zip(index, table.shape, strict=True)]
    if len(values) > _MOST_VALUES or math.prod(np.broadcast_shapes(*(np.shape(x) for x in places))) > MOST:
        return None
    found = table.double().numpy()[tuple(places)]
    return [(both(holds, found == x), x, ()) for x in values]


def both(x: Array, y: Any) -> Array:
    """Where two conditions hold. Raises `Unproven` where that would be an array of too many elements."""
    if math.prod(np.broadcast_shapes(np.shape(x), np.shape(y))) > MOST:
        raise Unproven(f"more than {MOST} places would have to be looked at")
    return np.asarray(x & y)


def _within(x: Any, low: int, high: int) -> Array:
    return np.asarray((plain(x) >= low) & (plain(x) < high))


def _split(holds: Array, inside: Array, one: tuple[Any, Any], other: tuple[Any, Any]) -> list[Part]:
    return [(both(holds, inside), *one), (both(holds, ~inside), *other)]


def _pad(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    if a.get("mode", "constant") != "constant" or not all(isinstance(n, int) for n in a["pad"]):
        return None
    at, inside = list(index), np.ones([1] * holds.ndim, dtype=bool)
    for place in (i for i in range(len(a["pad"]) // 2) if any(a["pad"][2 * i : 2 * i + 2])):
        dim = len(index) - 1 - place
        at[dim] = index[dim] - a["pad"][2 * place]
        inside = both(inside, _within(at[dim], 0, int(value(a["self"]).shape[dim])))
    return _split(holds, inside, (a["self"], at), (a.get("value") or 0, ()))


def _slice_scatter(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    dim, step = a["dim"] % len(index), a.get("step", 1)
    given = [x for x in (a.get("start"), a.get("end"), step) if x is not None]
    if not all(isinstance(x, int) for x in given):
        return None
    start, stop, _ = slice(a.get("start"), a.get("end"), step).indices(int(value(node).shape[dim]))
    moved = index[dim] - start
    inside = _within(index[dim], start, stop) & (plain(moved) % step == 0)
    source = (*index[:dim], moved if step == 1 else combined(np.floor_divide, moved, step), *index[dim + 1 :])
    return _split(holds, inside, (a["src"], source), (a["self"], index))


def _select_scatter(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    dim = a["dim"] % len(index)
    if not isinstance(a["index"], int):
        return None
    inside = np.asarray(plain(index[dim]) == a["index"] % int(value(node).shape[dim]))
    return _split(holds, inside, (a["src"], (*index[:dim], *index[dim + 1 :])), (a["self"], index))


def _cat(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Iterator[Part]:
    dim, start = a["dim"] % len(index), 0
    for part in a["tensors"]:
        stop = start + int(value(part).shape[dim])
        moved = index[dim] - start
        yield both(holds, _within(index[dim], start, stop)), part, (*index[:dim], moved, *index[dim + 1 :])
        start = stop


def _stack(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Iterator[Part]:
    dim = a["dim"] % len(index)
    for place, part in enumerate(a["tensors"]):
        yield both(holds, _within(index[dim], place, place + 1)), part, (*index[:dim], *index[dim + 1 :])


def _roll(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    if not a["dims"] or not all(isinstance(n, int) for n in a["shifts"]):
        return None
    old = list(index)
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        old[dim] = combined(np.mod, old[dim] - shift, int(value(node).shape[dim]))
    return [(holds, a["self"], old)]


def _unfold(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    """Windows of one dimension, each place in a window along a last dimension of its own."""
    old, dim = list(index[:-1]), a["dimension"] % (len(index) - 1)
    old[dim] = old[dim] * a["step"] + index[-1]
    return [(holds, a["self"], old)]


def _as_strided(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    """Memory read by strides, which the graph holds as numbers: it was captured for the layout of its fake values."""
    base, offset = a["self"], a.get("storage_offset")
    if offset not in (None, value(base).storage_offset()):
        return None
    old = strided(base, a["size"], a["stride"], index, holds)
    return None if old is None else [(holds, base, old)]


def _select(tracer: Tracer, node: fx.Node, a: dict[str, Any], index: Any, holds: Array) -> Any:
    """A choice by a mask that the graph itself makes."""
    mask = a["condition"] if "condition" in a else a["mask"]
    given = (a["self"], a["other"]) if "condition" in a else (a["value"], a["self"])
    table = tracer.constants.tensor(mask)
    parts = None if table is None else _valued(table, trailing(mask, index), holds)
    if parts is None:
        return None
    chosen = [(part, given[0] if test else given[1]) for part, test, _ in parts]
    return [(part, x, trailing(x, index) if isinstance(x, fx.Node) else ()) for part, x in chosen]


def _same_type(x: Any, dtype: torch.dtype) -> bool:
    """Whether a part keeps its type in the whole; numbers take that of the others."""
    return not isinstance(x, fx.Node) or value(x).dtype == dtype


RULES: dict[str, Callable[..., Any]] = {
    "aten::pad": _pad,
    "aten::constant_pad_nd": _pad,
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
    "aten::cat": _cat,
    "aten::stack": _stack,
    "aten::roll": _roll,
    "aten::unfold": _unfold,
    "aten::as_strided": _as_strided,
    "aten::where": _select,
    "aten::masked_fill": _select,
}
