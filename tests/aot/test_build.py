"""A dozen specs for Hopper and one for each of the others; `make triton` builds all for all."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from attnopt.aot.build import build, compile_spec
from attnopt.aot.standard import standard
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import CompileError
from attnopt.runtime.triton_compile import PRODUCTS
from attnopt.spec import Heads

ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
SMALL = Heads(8, 2, 2, 64, 64)
SPECS = dict(standard() if ALL else standard(SMALL))


@pytest.mark.parametrize(
    ("chip", "names"),
    [("sm_90", tuple(SPECS)), *((c, tuple(SPECS) if ALL else ("padding",)) for c in CHIPS if c != "sm_90")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_specs_fit_the_chip(chip: str, names: tuple[str, ...]) -> None:
    said: list[str] = []
    for name, _, kernel, made in build(((n, SPECS[n]) for n in names), [CHIPS[chip]], "bfloat16", said.append):
        assert made.problem is None, name
        assert made.instructions.get(PRODUCTS[chip], 0) > 0, name
        assert chip not in ("sm_80", "sm_90") or made.instructions["cp.async"] > 0, name
        assert kernel.layout.dtype == "bfloat16"
    assert len(said) == len(names)
    assert all(chip in line and "registers" in line for line in said)


def test_a_plan_that_does_not_fit_is_passed_over() -> None:
    chip = CHIPS["sm_90"]
    _, most = compile_spec(SPECS["padding"], chip, "bfloat16")
    kernel, made = compile_spec(SPECS["padding"], replace(chip, shared=most.shared - 1), "bfloat16")
    assert made.shared < most.shared
    assert kernel.plan.block_n < 128


def test_where_nothing_fits_the_reason_is_given() -> None:
    with pytest.raises(CompileError, match="needs .* bytes of shared memory"):
        compile_spec(SPECS["padding"], replace(CHIPS["sm_90"], shared=1), "bfloat16")
    with pytest.raises(CompileError, match="no plan is known"):
        compile_spec(replace(SPECS["padding"], heads=Heads(1, 1, 1, 512, 512)), CHIPS["sm_90"], "bfloat16")
