"""What a sparse attention costs, before and after, counted in multiplications of visited tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tables
from attnopt.analysis.blocks import EMPTY
from attnopt.graph import value
from attnopt.passes.stage import Seen, Stage
from attnopt.region import Operand, Region
from attnopt.runtime.chosen import chosen
from attnopt.select import Select
from attnopt.spec import AttentionSpec

_TILE = (64, 64)
# What ranking one score costs, and taking one element into a mean, in multiplications. The means are bound by memory:
# for a single query they cost as much as dense attention does.
_RANK, _MEAN = 30, 10
# A rewrite must save at least this share.
_SAVED = 0.1


def extent(operand: Operand, name: str) -> int:
    """A size of an operand; for a size known only at run time that of the example."""
    if name not in operand.dims:
        return 1
    size = value(operand.node).shape[operand.dims.index(name)]
    return size if isinstance(size, int) else int(size.node.hint or 1)


def too_dear(region: Region, spec: AttentionSpec, length: int | None, share: float | None) -> str | None:
    """The estimate, in words, if the sparse `spec` of a site would not pay; None if it would.

    `length` takes the place of the example's; `share` is the measured share of the candidates that is kept.
    """
    n_q, n_k = extent(region.query, "q"), extent(region.key, "k")
    if length is not None:
        n_q, n_k = (length if n_q > 1 else 1), length
    batch = 1
    sizes = {ex.n_b: batch, ex.n_h: spec.heads.q, ex.n_q: n_q, ex.n_k: n_k}
    sizes |= {ex.scalar(name): _number(region.scalars.get(name), n_k - n_q) for name in spec.scalars}
    tile = _TILE if spec.select is None else (spec.select.tile, spec.select.block)
    before = visited(region.spec, sizes, tile=tile)
    after = visited(spec, sizes, spec.select, share, tile)
    after += estimate(spec, n_q, n_k)
    if after <= (1 - _SAVED) * before:
        return None
    return (
        f"it would not pay: {after / 1e6:.3g} million multiplications a head instead of {before / 1e6:.3g} at {n_q} "
        f"queries and {n_k} keys; give length= to decide for longer inputs, or always=True"
    )


def visited(
    spec: AttentionSpec, sizes: Mapping[sp.Symbol, int], select: Select | None = None, share: float | None = None,
    tile: tuple[int, int] = _TILE,
) -> float:  # fmt: skip
    """Multiplications of the tiles that `keep` allows, and of those that are selected; the mean of all heads."""
    tile = min(tile[0], sizes[ex.n_q]), min(tile[1], sizes[ex.n_k])
    keep = sp.And(*[c for c in ex.conjuncts(spec.canonical().keep) if not c.has(ex.Load)])
    possible = tables.classes(tables.plan(keep), {}, sizes, tile).classes != EMPTY
    blocks = possible.sum(-1, dtype=np.float64)
    if select is not None:
        most = float(max(select.amount)) if select.rule == "topk" else math.inf
        blocks = np.minimum(blocks, most) if share is None else np.maximum(blocks * share, np.minimum(blocks, 1))
    rows = min(tile[0], sizes[ex.n_q])
    return float(blocks.mean((0, 1)).sum()) * rows * tile[1] * (spec.heads.d_qk + spec.heads.d_v)


def estimate(spec: AttentionSpec, n_q: int, n_k: int) -> float:
    """Multiplications of the selection for a head: means, products of them, and ranking."""
    if spec.select is None:
        return 0.0
    heads, width = spec.heads, spec.heads.d_qk
    scores = -(-n_q // spec.select.tile) * -(-n_k // spec.select.block)
    choosing = heads.k / heads.q if spec.select.shared else 1.0
    means = n_q * width + n_k * width * heads.k / heads.q
    return _MEAN * means + choosing * scores * (width + _RANK)


def measured(stage: Stage, specs: Mapping[str, AttentionSpec]) -> dict[str, float]:
    """The share of blocks that each selection keeps on the calibration inputs, of those that could be kept."""
    kept: dict[str, list[float]] = {key: [0.0, 0.0] for key in specs}

    def see(key: str, seen: Seen) -> None:
        if key not in specs or specs[key].select is None:
            return
        spec = replace(seen.spec, select=specs[key].select)
        whole = replace(spec, select=replace(spec.select, rule="topk", amount=(sp.Integer(seen.k.shape[2]),)))  # type: ignore[arg-type]
        for place, one in enumerate((spec, whole)):
            kept[key][place] += float(chosen(one, seen.q, seen.k, seen.captures, seen.scalars).sum())

    stage.visit(see)
    return {key: some / most for key, (some, most) in kept.items() if most}


def _number(given: object, default: int) -> int:
    hint = getattr(getattr(given, "meta", {}).get("val"), "node", None)
    if isinstance(given, int):
        return given
    return int(hint.hint) if hint is not None and hint.hint is not None else default
