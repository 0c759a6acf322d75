"""Which schedule a CPU kernel gets: rows of data, the first that applies wins. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy as sp

from attnopt.codegen.base import Plan
from attnopt.spec import AttentionSpec


@dataclass(frozen=True)
class Sizes:
    """The run-time sizes that a schedule depends on."""

    batch: int
    n_q: int
    n_k: int


@dataclass(frozen=True)
class Row:
    """A schedule and when it is the best. `make` gets the lanes of a vector: 4, 8 or 16."""

    name: str
    applies: Callable[[AttentionSpec, Sizes], bool]
    make: Callable[[int], Plan]


def _rows(lanes: int) -> int:
    """Rows of the register tile by two vectors: 32 registers hold 12 rows; 16 hold 6, of which 4 are the fastest."""
    return {4: 4, 8: 4, 16: 12}[lanes]


def _group(spec: AttentionSpec) -> int:
    """Query heads that share a key head, at most."""
    return max(spec.heads.k_map.count(head) for head in set(spec.heads.k_map))


def _streams(spec: AttentionSpec, sizes: Sizes) -> bool:
    """Few rows for each key head: packing keys and values would cost more than what it saves."""
    heads = spec.heads
    if sizes.n_k <= 2 and _group(spec) == 1 and _fits(spec, sizes):
        return False  # so few keys are not packed
    shared = heads.k == heads.v and heads.k_map == heads.v_map
    return shared and sizes.n_q * _group(spec) <= 16


def _long(spec: AttentionSpec, sizes: Sizes) -> bool:
    """Larger tiles cost less per tile; a window or a short sequence would waste what lies outside of it."""
    return sizes.n_q >= 384 and sizes.n_k >= 1024


def _fits(spec: AttentionSpec, sizes: Sizes) -> bool:
    """All keys are one tile, and all rows are computed."""
    return sizes.n_k <= 128 and spec.rows == sp.true


def _small(spec: AttentionSpec, sizes: Sizes) -> bool:
    """So few keys that scores should lie closer together."""
    return sizes.n_k <= 64 and _fits(spec, sizes)


PLANS: tuple[Row, ...] = (
    Row("stream", _streams, lambda lanes: Plan(16, 32, lanes, min(lanes, 8), "stream")),
    # A block of every height is generated. Multiply-adds are as busy with eight or ten sums as with twelve, and the
    # fewer rows, the less lies between the products.
    Row("whole", _small, lambda lanes: Plan(48, 64, lanes, min(_rows(lanes), 5), "whole")),
    Row("whole, more keys", _fits, lambda lanes: Plan(48, 128, lanes, min(_rows(lanes), 4), "whole")),
    Row("long", _long, lambda lanes: Plan(96, 256, lanes, _rows(lanes))),
    Row("tile", lambda spec, sizes: True, lambda lanes: Plan(48, 128, lanes, _rows(lanes))),
)


def listed(plan: Plan, block: int = 64) -> Plan:
    """The schedule that goes by lists of blocks of keys: `block` keys, as far as a tile may have so many.

    Small tiles lie closer to what a mask keeps.
    """
    if plan.form == "stream":
        return replace(plan, listed=max(plan.block_k, block))
    width = 128 if block >= 128 else 64
    return replace(plan, block_q=64, block_k=width, listed=width, form="tile")


def backward_plan(lanes: int) -> Plan:
    """The schedule of the gradients on a processor with vectors of so many floats."""
    return Plan(96, 96, lanes, {4: 4, 8: 6, 16: 12}[lanes], "backward")


def choose(spec: AttentionSpec, sizes: Sizes, lanes: int) -> Plan:
    """The schedule for these sizes on a processor with vectors of so many floats."""
    return next(row.make(lanes) for row in PLANS if row.applies(spec, sizes))
