"""The estimate of shared memory is never less than what the compiler found, and refuses what does not fit."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.aot.standard import standard
from attnopt.codegen.triton_fit import chosen, fitting, shared
from attnopt.codegen.triton_kinds import proposed
from attnopt.codegen.triton_plans import CHIPS, PLANS, TritonPlan, backward_plans, decode_plans, plans
from attnopt.spec import AttentionSpec, Capture, Heads

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ROWS = json.loads((RESULTS / "aot.json").read_text(encoding="utf-8"))["rows"]


@cache
def usual(width: int) -> dict[str, AttentionSpec]:
    return dict(standard(Heads(32, 8, 8, width, width)))


def plan_of(text: str) -> TritonPlan:
    found = re.match(r"(\d+) queries x (\d+) keys, (\d+) warps, (\d+) stages", text)
    assert found is not None
    return TritonPlan(*map(int, found.groups()))


def estimate(row: dict[str, Any]) -> int:
    return shared(usual(row["width"])[row["spec"]], CHIPS[row["arch"]], row["dtype"], row["kind"], plan_of(row["plan"]))


@pytest.mark.parametrize("table", ["aot.json", "aot_plans.json"])
def test_no_kernel_that_was_compiled_takes_more_than_the_estimate(table: str) -> None:
    rows = json.loads((RESULTS / table).read_text(encoding="utf-8"))["rows"]
    compiled = [row for row in rows if "shared" in row and row["kind"] in PLANS]
    assert len(compiled) > 200
    assert [row for row in compiled if estimate(row) < row["shared"]] == []


def test_no_default_of_the_usual_attentions_has_a_problem() -> None:
    assert [(row["spec"], row["entry"], row["arch"], row["problem"]) for row in ROWS if row["problem"]] == []


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("kind", sorted(PLANS))
def test_every_chip_keeps_a_plan_for_a_bias(chip: Any, kind: str) -> None:
    for width in (64, 128, 256):
        for dtype in ("bfloat16", "float32"):
            # A tile of fp32 gradients of the widest heads is more than the cards with 99 KiB hold.
            none = (width, dtype, kind) == (256, "float32", "backward") and chip.shared == 99 * 1024
            for name in ("causal", "bias", "documents"):
                assert bool(fitting(usual(width)[name], chip, dtype, kind)) is not none


def test_what_a_spec_loads_decides() -> None:
    chip, plain = CHIPS["gfx942"], usual(64)["causal"]
    bias = usual(64)["bias"]
    assert fitting(plain, chip, "bfloat16", "forward") == plans(chip, "bfloat16", 64, 64)
    left = fitting(bias, chip, "bfloat16", "forward")
    assert left[0] == plans(chip, "bfloat16", 64, 64)[1]
    assert proposed("forward", bias, chip, "bfloat16") == left
    assert decode_plans(CHIPS["sm_90"], "bfloat16", 128, 128) == fitting(
        usual(128)["bias"], CHIPS["sm_90"], "bfloat16", "decode"
    )


def test_many_loads_by_score_leave_small_tiles() -> None:
    many = tuple(Capture(f"bias{i}", "int", (None,) * 4) for i in range(8))
    score = ex.s + sum(ex.load(c.name, ex.b, ex.h, ex.q, ex.k) for c in many)
    spec = AttentionSpec(Heads(8, 8, 8, 128, 128), score=score, captures=many)
    assert all(p.block_n <= 32 for p in fitting(spec, CHIPS["sm_80"], "bfloat16", "forward"))
    # Without a pipeline, AMD loads into registers.
    assert all(p.stages == 1 for p in fitting(spec, CHIPS["gfx942"], "bfloat16", "forward"))
    assert (
        fitting(spec, CHIPS["sm_80"], "bfloat16", "backward")
        == backward_plans(CHIPS["sm_80"], "bfloat16", 128, 128)[1:]
    )


# Bytes that the compiler found for kernels that go by a list, of heads 64 and of 128: chip, plan, with a map, without.
LISTED = (
    ("sm_80", 64, (128, 64, 4, 3), 98308, 49152),
    ("sm_90", 64, (64, 64, 4, 4), 73732, 73728),
    ("sm_90", 128, (128, 64, 8, 3), 163844, 0),
    ("sm_90", 64, (128, 128, 8, 2), 212992, 0),
    ("sm_100", 64, (128, 64, 4, 3), 114724, 65568),
    ("gfx942", 64, (128, 64, 4, 2), 24576, 16384),
)


@pytest.mark.parametrize(("name", "width", "sizes", "mapped", "plain"), LISTED)
def test_kernels_that_go_by_a_list(name: str, width: int, sizes: tuple[int, ...], mapped: int, plain: int) -> None:
    block = ex.load("blocks", ex.h, ex.FloorDiv(ex.q, 128), ex.FloorDiv(ex.k, 128), integer=True)
    heads, captures = Heads(4, 4, 4, width, width), (Capture("blocks", "int", (None,) * 3),)
    spec, plan = AttentionSpec(heads, ex.s, sp.Ne(block, 0), captures=captures), TritonPlan(*sizes, listed=True)
    assert mapped <= shared(spec, CHIPS[name], "bfloat16", "forward", plan) <= CHIPS[name].shared * 2
    assert plain <= shared(AttentionSpec(heads, ex.s, ex.k <= ex.q), CHIPS[name], "bfloat16", "forward", plan)
    if width == 128:  # the plan of an attention without a map
        assert plan in chosen([plan], spec, CHIPS[name], "bfloat16", "forward")
