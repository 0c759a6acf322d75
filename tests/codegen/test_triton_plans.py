"""The table of plans is whole and made of what Triton takes."""

from __future__ import annotations

import itertools

import pytest

from attnopt import expr as ex
from attnopt.codegen.triton_fit import fitting
from attnopt.codegen.triton_plans import CHIPS, PLANS, decode_plans, plans, wants_split
from attnopt.spec import AttentionSpec, Heads


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [16, 40, 64, 96, 128, 192, 256])
def test_every_chip_has_plans(chip: object, dtype: str, width: int) -> None:
    found = plans(chip, dtype, width, width)  # type: ignore[arg-type]
    assert 0 < len(found) <= 12
    assert len(set(found)) == len(found)
    for plan in found:
        for value in (plan.block_m, plan.block_n, plan.warps):
            assert value & (value - 1) == 0
        assert min(plan.block_m, plan.block_n) >= 16
        assert plan.fp32 == ("ieee" if chip.backend == "hip" else "tf32x3")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["sm_86", "sm_89", "sm_120"])
def test_cards_have_rows_that_fit_99_kib(name: str) -> None:
    """With nothing loaded beside queries, keys and values every row fits, but for fp32 gradients of the widest heads."""
    chip = CHIPS[name]
    assert chip.shared == 99 * 1024
    for width in (64, 128, 256):
        spec = AttentionSpec(Heads(8, 2, 2, width, width), ex.s, ex.k <= ex.q)
        for dtype, kind in itertools.product(("bfloat16", "float32"), PLANS):
            rows = PLANS[kind](chip, dtype, width, width)
            whole = (dtype, kind, width) != ("float32", "backward", 256)
            assert fitting(spec, chip, dtype, kind) == (rows if whole else ())


def test_no_plan_for_what_no_tile_holds() -> None:
    assert plans(CHIPS["sm_90"], "bfloat16", 512, 64) == ()
    assert plans(CHIPS["sm_90"], "float64", 64, 64) == ()


def test_wider_values_decide() -> None:
    chip = CHIPS["sm_80"]
    assert plans(chip, "bfloat16", 64, 256) == plans(chip, "bfloat16", 256, 64)


def test_keys_are_split_where_programs_are_few() -> None:
    chip = CHIPS["sm_90"]
    assert wants_split(chip, 8, 4, 8192)
    assert not wants_split(chip, 132, 4, 8192)
    assert not wants_split(chip, 8, 4, 100)
    assert not wants_split(chip, 8, 128, 8192)
    assert all(plan.block_m == 16 for plan in decode_plans(chip, "bfloat16", 128, 128))
    assert decode_plans(chip, "float64", 64, 64) == ()
