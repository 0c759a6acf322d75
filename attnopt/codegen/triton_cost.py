"""What a plan should cost on a chip: a small model that puts plans in the order in which they are worth measuring.

The model knows three things: how many tiles there are and how evenly they fill the chip, what is wasted on rows and
keys past the end, and how far a tile's products, exponentials and loads overlap. It decides what is measured, never
what is right: plans come from tables whose rows were compiled for their chips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen.triton_decode import group
from attnopt.codegen.triton_fit import chosen
from attnopt.codegen.triton_forward import block_width
from attnopt.codegen.triton_plans import PLANS, Chip, TritonPlan, extra_plans
from attnopt.spec import AttentionSpec, Pointwise

# The most plans that are worth measuring.
MOST = 12
# A chip's products of a clock and processor (16-bit elements, dense), special functions, and bytes of loads.
# On cards those with sums in fp32, which run at half the rate.
_PRODUCTS = {"sm_80": 1024.0, "sm_86": 256.0, "sm_89": 256.0, "sm_90": 4096.0 * 0.75, "sm_100": 8192.0,
             "sm_120": 256.0, "gfx942": 2048.0}  # fmt: skip
_SPECIAL, _LOADED = 16.0, 64.0
# Tiles of fewer rows than a warpgroup's product leave part of it idle.
_FULL_ROWS = {"sm_80": 64, "sm_86": 64, "sm_89": 64, "sm_90": 64, "sm_100": 128, "sm_120": 64, "gfx942": 32}
_REGISTERS = 65536


@dataclass(frozen=True)
class Problem:
    """The sizes of one call."""

    batch: int
    n_q: int
    n_k: int

    @property
    def shape_class(self) -> str:
        """Sizes whose logarithms round to the same number have one best plan; so do lengths that all divide alike."""
        logs = (round(2.0 * math.log2(max(1, n))) for n in (self.n_q, self.n_k))
        whole = "whole" if self.n_q % 128 == self.n_k % 128 == 0 else "ragged"
        return " ".join([f"b{max(1, self.batch).bit_length()}", *map(str, logs), whole])


def spec_class(spec: AttentionSpec, dtype: str) -> str:
    """What of a spec decides which plan is best: widths, heads, ranges, and what is loaded and computed by score."""
    heads, ends = spec.heads, tiles.key_ranges(tiles.analyse(spec.keep).bounds)
    parts = (spec.score, spec.keep, spec.weight)
    names = {ex.b: "b", ex.h: "h", ex.q: "q", ex.k: "k"}
    # A line and a dense bias depend on the same coordinates; they differ in rank.
    loads = sorted(
        "".join(n for c, n in names.items() if ex.depends(x, c)) + str(len(x.args) - 1) for x in ex.loads(*parts)
    )
    return " ".join(
        [
            dtype,
            f"{heads.q}/{heads.k}/{heads.v} {heads.d_qk}/{heads.d_v}",
            type(spec.normalizer).__name__.lower(),
            "ranges " + "".join("01"[e not in (0, ex.n_k)] for e in ends),
            "loads " + ",".join(loads),
            f"operations {_operations(spec)}",
        ]
    )


def _operations(spec: AttentionSpec) -> int:
    """Functions of each score beside the exponential of a softmax."""
    return sum(
        1 for part in (spec.score, spec.weight) for node in sp.preorder_traversal(part)
        if isinstance(node, sp.Function) and not isinstance(node, ex.Load) and ex.depends(node, ex.s)
    )  # fmt: skip


def proposals(spec: AttentionSpec, chip: Chip, dtype: str, kind: str, problem: Problem) -> tuple[TritonPlan, ...]:
    """At most `MOST` plans that fit, those that should be fastest first; none where no tile of these widths fits."""
    heads = spec.heads
    found = PLANS[kind](chip, dtype, heads.d_qk, heads.d_v)
    more = extra_plans(chip, dtype, heads.d_qk, heads.d_v, kind)
    fitting = chosen(dict.fromkeys((*found, *more)), spec, chip, dtype, kind)
    costs = {plan: seconds(spec, chip, dtype, kind, plan, problem) for plan in fitting}
    return tuple(sorted(costs, key=costs.__getitem__)[:MOST])


def seconds(spec: AttentionSpec, chip: Chip, dtype: str, kind: str, plan: TritonPlan, problem: Problem) -> float:
    """The time that the model expects, in units of one clock: right to compare plans, not as a time."""
    heads, packed = spec.heads, group(spec) if kind == "decode" else 1
    rows, batch = packed * problem.n_q, problem.batch * heads.q // packed
    programs = batch * -(-rows // plan.block_m)
    n_tiles = -(-_visited(spec, plan, problem) // plan.block_n)
    if kind == "decode":  # splits make as many programs as there are processors
        splits = max(1, min(2 * chip.processors // programs, n_tiles))
        programs, n_tiles = programs * splits, -(-n_tiles // splits)
    waves = -(-programs // (chip.processors * _beside(spec, chip, dtype, plan)))
    # What is neither product nor load: starts of pipelines, the first and last tile.
    return waves * _beside(spec, chip, dtype, plan) * (n_tiles + plan.stages + 2) * _tile(spec, chip, dtype, kind, plan)


def _visited(spec: AttentionSpec, plan: TritonPlan, problem: Problem) -> int:
    """Keys that a tile in the middle visits, on average, as far as positions decide."""
    ends = tiles.key_ranges(tiles.analyse(spec.keep).bounds)
    middle = problem.n_q // 2
    known = {
        symbol: sp.Integer(value)
        for symbol, value in (
            (tiles.q0, middle), (tiles.q1, min(middle + plan.block_m, problem.n_q)), (ex.n_q, problem.n_q),
            (ex.n_k, problem.n_k), (ex.n_b, problem.batch), (ex.n_h, spec.heads.q), (ex.b, 0), (ex.h, 0),
        )
    }  # fmt: skip
    low, high = (_number(e.xreplace(known)) for e in ends[:2])
    if low is None or high is None:
        return problem.n_k
    return max(1, min(problem.n_k, high) - max(0, low))


def _number(value: sp.Expr) -> int | None:
    return int(value) if value.is_number and value.is_finite else None


def _tile(spec: AttentionSpec, chip: Chip, dtype: str, kind: str, plan: TritonPlan) -> float:
    """Clocks of one tile of queries by keys."""
    d_qk, d_v = block_width(spec.heads.d_qk), block_width(spec.heads.d_v)
    products = {"backward": 3 * d_qk + 2 * d_v}.get(kind, d_qk + d_v) * plan.block_m * plan.block_n
    rate = _PRODUCTS[chip.name] / (1.0 if dtype != "float32" else 6.0)
    rate *= min(1.0, plan.block_m / _FULL_ROWS[chip.name]) * min(1.0, plan.block_n / 64 + 0.25)
    scores = plan.block_m * plan.block_n * (_operations(spec) + (0 if isinstance(spec.normalizer, Pointwise) else 1))
    size = 4 if dtype == "float32" else 2
    loads = plan.block_n * (d_qk + d_v) * size
    loads += 4 * plan.block_m * plan.block_n * sum(ex.depends(x, ex.q) for x in ex.loads(spec.score, spec.keep))
    clocks = sorted((products / rate, scores / _SPECIAL, loads / (_LOADED * min(1.0, plan.stages / 3))))
    # Warps that wait leave the others room: the more of them, the more of the smaller terms is hidden.
    return clocks[-1] + (clocks[0] + clocks[1]) * (0.5 if plan.warps >= 8 else 0.7)


def _beside(spec: AttentionSpec, chip: Chip, dtype: str, plan: TritonPlan) -> int:
    """How many programs share a processor, by shared memory and registers."""
    size, heads = 4 if dtype == "float32" else 2, spec.heads
    shared = (
        size * (plan.stages * plan.block_n + plan.block_m) * (block_width(heads.d_qk) + block_width(heads.d_v)) // 2
    )
    threads = plan.warps * chip.warp
    registers = min(plan.maxnreg or 255, 32 + (plan.block_m * (plan.block_n + block_width(heads.d_v))) // threads)
    return max(1, min(chip.shared // max(1, shared), _REGISTERS // (threads * max(32, registers)), 4))
