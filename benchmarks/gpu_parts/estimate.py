"""How long a run on the chip should take, phase by phase: what the dry run prints, and what its budget must hold.

Times of a kernel come from its floor, times of a compilation from what it took a core elsewhere. They decide nothing on
the chip: there every phase has a deadline, and the whole run `LAST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu_parts.rivals import SDPA
from gpu_parts.rows import Row

# Seconds from the start after which nothing of a phase is begun, and after which whatever still runs is left.
BUDGET: Mapping[str, float] = {"correctness": 170.0, "compile": 240.0, "table": 440.0, "thorough": 480.0}
LAST = 525.0
# What is taken for an H200's rates (FLOP/s of bf16, bytes/s), and for the share of them that a call reaches.
ROOF, REACHED = {"flops": 700e12, "bytes": 4.0e12}, 0.4
# Seconds: processes that import PyTorch and start the driver; compilations of one core.
START, CHECK, PLAN, FLEX, FLEX_TUNED, ROW = 15.0, 3.0, 4.0, 5.0, 18.0, 0.7
CORES = 14
# Calls of one measurement, and measurements of a plan in tuning.
CALLS, TUNING = 17, 2 * 11


def seconds(rows: Sequence[Row], checks: int, plans: Mapping[str, int]) -> dict[str, float]:
    """Each phase by itself; `plans`: how many are measured for each row."""
    return {
        "correctness": START + checks * CHECK / CORES,
        "compile": START + sum(plans.values()) * PLAN / CORES,
        "table": sum(_row(row, plans.get(row.name, 0)) for row in rows),
        "thorough": sum(FLEX_TUNED + CALLS * _call(row) for row in rows if row.thorough),
    }


def _row(row: Row, plans: int) -> float:
    others = len(SDPA) + 1
    return ROW + (FLEX if row.flex else 0.0) + _call(row) * (CALLS * (1 + others) + TUNING * plans)


def _call(row: Row) -> float:
    return row.floor(ROOF) / REACHED + 1e-4


def ends(found: Mapping[str, float]) -> dict[str, float]:
    """When each phase is over, seconds from the start, as its deadline allows."""
    made, now = {}, 0.0
    for phase, deadline in BUDGET.items():
        now = min(now + found[phase], max(now, deadline))
        made[phase] = now
    return made


def text(found: Mapping[str, float]) -> str:
    """The estimate as a line, with what does not fit its deadline."""
    now, over = 0.0, []
    for phase, end in ends(found).items():
        if now + found[phase] > end:
            over.append(phase)
        now = end
    parts = ", ".join(f"{phase} {taken:.0f} s" for phase, taken in found.items())
    late = f"; of {', '.join(over)} something would be left out" if over else ""
    return f"expected on an H200 with {CORES} free cores: {parts}; {now:.0f} s of {LAST:.0f}{late}"
