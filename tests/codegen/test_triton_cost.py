"""The order in which plans are worth measuring."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt import expr as ex
from attnopt.aot.standard import standard
from attnopt.codegen.triton_cost import MOST, Problem, proposals, seconds, spec_class
from attnopt.codegen.triton_plans import CHIPS, PLANS, TritonPlan, extra_plans
from attnopt.spec import AttentionSpec, Heads

H200 = CHIPS["sm_90"]
USUAL: dict[str, AttentionSpec] = dict(standard(Heads(32, 8, 8, 128, 128)))
LONG = Problem(4, 4096, 4096)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("kind", sorted(PLANS))
@pytest.mark.parametrize("width", [40, 128, 256])
def test_a_dozen_plans_of_the_tables_at_most(chip: object, kind: str, width: int) -> None:
    spec = dict(standard(Heads(8, 2, 2, width, width)))["causal"]
    for dtype in ("bfloat16", "float32"):
        about = (chip, dtype, width, width)
        found = proposals(spec, chip, dtype, kind, LONG)  # type: ignore[arg-type]
        known = {*PLANS[kind](*about), *extra_plans(*about, kind)}  # type: ignore[arg-type]
        if (width, dtype, kind, chip.shared) == (256, "float32", "backward", 99 * 1024):  # type: ignore[attr-defined]
            assert not found
            continue
        assert 0 < len(found) <= MOST
        assert set(found) <= known
        assert len(set(found)) == len(found)
        costs = [seconds(spec, chip, dtype, kind, p, LONG) for p in found]  # type: ignore[arg-type]
        assert costs == sorted(costs)


def test_no_proposal_where_no_tile_fits() -> None:
    spec = replace(USUAL["dense"], heads=Heads(1, 1, 1, 300, 300))
    assert proposals(spec, H200, "bfloat16", "forward", LONG) == ()


def test_costs_grow_with_the_work_and_fall_with_the_mask() -> None:
    plan = TritonPlan(128, 64, 8, 3)

    def cost(name: str, problem: Problem = LONG, dtype: str = "bfloat16", kind: str = "forward") -> float:
        return seconds(USUAL[name], H200, dtype, kind, plan, problem)

    assert cost("window") < cost("causal") < cost("dense") < cost("bias")
    assert cost("dense", Problem(4, 8192, 8192)) > 3 * cost("dense")
    assert cost("softcap") > cost("causal")
    assert cost("dense", dtype="float32") > 2 * cost("dense")
    assert cost("dense", kind="backward") > cost("dense")


def test_tiles_of_few_rows_are_for_few_rows() -> None:
    """A tile that is mostly past the end does not pay."""
    wide, narrow = TritonPlan(128, 64, 8, 3), TritonPlan(64, 64, 4, 3)
    few, many = Problem(64, 33, 4096), Problem(64, 4096, 4096)
    spec = USUAL["dense"]
    ratio = [
        seconds(spec, H200, "bfloat16", "forward", narrow, p) / seconds(spec, H200, "bfloat16", "forward", wide, p)
        for p in (few, many)
    ]
    assert ratio[0] < 1 < ratio[1]


def test_classes_of_sizes() -> None:
    assert LONG.shape_class == Problem(5, 4224, 3968).shape_class
    assert len({Problem(*x).shape_class for x in ((4, 4096, 4096), (4, 4097, 4096), (64, 4096, 4096), (4, 1, 4096),
                                                  (4, 8192, 4096), (4, 4096, 8192))}) == 6  # fmt: skip


def test_classes_of_specs() -> None:
    """Another window or another scale is no other class; another load or range is."""
    window = USUAL["window"]
    other = replace(window, keep=window.keep.subs(1024, 512) if window.keep.has(1024) else window.keep)
    same = replace(window, score=window.score * ex.number(0.5))
    assert spec_class(window, "bfloat16") == spec_class(same, "bfloat16") == spec_class(other, "bfloat16")
    texts = {spec_class(USUAL[name], "bfloat16") for name in ("dense", "causal", "window", "bias", "line", "softcap")}
    assert len(texts) == 6
    assert spec_class(window, "float16") != spec_class(window, "bfloat16")
