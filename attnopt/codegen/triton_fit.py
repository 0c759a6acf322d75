"""How much shared memory a plan needs for a spec, before anything is compiled: plans that do not fit are not proposed.

The tables of plans were compiled for a spec that loads nothing by score. A bias is a tile of its own in every stage of
the pipeline, so what fits is decided for each spec. The estimate is an upper one: `tests/codegen/test_triton_fit.py`
holds it against every kernel of `benchmarks/results/aot.json`.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnopt import expr as ex
from attnopt.codegen.triton_forward import block_width
from attnopt.codegen.triton_plans import PLANS, Chip, TritonPlan
from attnopt.spec import AttentionSpec, Softmax

# What is neither a tile nor loaded: barriers, and what a reduction passes between warps. The gradients have more.
_SLACK, _SLACK_BACKWARD = 2048, 4096
_BYTES = {"float": 4, "int": 8, "bool": 1}


def fitting(spec: AttentionSpec, chip: Chip, dtype: str, kind: str) -> tuple[TritonPlan, ...]:
    """The plans of a kind of the tables that fit the chip with what the spec loads, the default first."""
    heads = spec.heads
    return chosen(PLANS[kind](chip, dtype, heads.d_qk, heads.d_v), spec, chip, dtype, kind)


def chosen(
    plans: Iterable[TritonPlan], spec: AttentionSpec, chip: Chip, dtype: str, kind: str
) -> tuple[TritonPlan, ...]:
    """Those of the plans that fit."""
    return tuple(plan for plan in plans if shared(spec, chip, dtype, kind, plan) <= chip.shared)


def shared(spec: AttentionSpec, chip: Chip, dtype: str, kind: str, plan: TritonPlan) -> int:
    """At most this many bytes of shared memory does a block of the kernel take."""
    size = 4 if dtype == "float32" else 2
    width = size * (block_width(spec.heads.d_qk) + block_width(spec.heads.d_v))
    keys, rows = plan.block_n * width, plan.block_m * width
    scores = plan.block_m * plan.block_n * 4
    by_score, by_row, by_key = _loaded(spec, plan)
    if chip.backend == "hip":
        # Operands stay in registers: what is in flight is held, and results that change their layout pass through.
        moved = size * max(plan.block_m, plan.block_n) * max(width // (2 * size), 1)
        flying = (plan.stages - 1) * (max(keys, rows) if kind == "backward" else keys)
        return max(moved, flying + scores + (plan.stages - 1) * (by_score + by_row + by_key))
    # A list is loaded a stage before what it leads to, and a tile of scores is in flight for one stage less.
    loads = max(1, plan.stages - 1 - plan.listed) * by_score + plan.stages * (by_row + by_key)
    if kind != "backward":
        return plan.stages * keys + rows // 2 * (2 if size == 4 else 1) + loads + _SLACK
    # A product of fp32 parts, and one of the fifth tensor cores, hold the resident tiles in a second layout.
    copies = 2 if size == 4 or chip.name == "sm_100" else 1
    dkv = plan.stages * (rows + 8 * plan.block_m) + copies * keys + 2 * scores * size // 4
    dq = plan.stages * keys + copies * rows + scores * size // 4
    return max(dkv, dq) + loads + _SLACK_BACKWARD


def _loaded(spec: AttentionSpec, plan: TritonPlan) -> tuple[int, int, int]:
    """Bytes of what a tile loads: one element a score, a row, a key."""
    parts = [spec.score, spec.keep, spec.weight]
    if isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is not None:
        parts.append(spec.normalizer.sink)
    kinds = {capture.name: _BYTES[capture.kind] for capture in spec.captures}
    by_score = by_row = by_key = 0
    for load in ex.loads(*parts):
        size = kinds[load.args[0].name]
        rows, keys = ex.depends(load, ex.q), ex.depends(load, ex.k)
        by_score += size * plan.block_m * plan.block_n * (rows and keys)
        by_row += size * plan.block_m * (rows and not keys)
        by_key += size * plan.block_n * (keys and not rows)
    return by_score, by_row, by_key
