"""The choice of blocks in Triton: its text, that it fits the chips, and why there is none for a spec."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt._version import VERSION
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_plans import CHIPS
from attnopt.codegen.triton_select import emit_select, select_plans, supported_select
from attnopt.errors import SpecError
from attnopt.runtime.triton_compile import compile_entry
from attnopt.select import Select
from attnopt.spec import AttentionSpec, Heads

ALL = bool(os.environ.get("ATTNOPT_TEST_ALL"))
BF16 = Layout("bfloat16")
SELECT = Select("mass", (sp.Rational(9, 10),), own=ex.q, first=1, scale=sp.Rational(1, 8))


def _spec(**changes: Any) -> AttentionSpec:
    return replace(AttentionSpec(Heads(8, 2, 2, 64, 64), ex.s / 8, ex.k <= ex.q, select=SELECT), **changes)


def _kernel(spec: AttentionSpec, chip: str = "sm_90") -> Any:
    return emit_select(spec, BF16, select_plans(CHIPS[chip], "bfloat16", 64, 64)[0])


def test_what_differs_from_spec_to_spec_is_golden(golden: Callable[[str, str], None]) -> None:
    made = _kernel(_spec()).source
    own = made[: made.index("@triton.jit(do_not_specialize")].rstrip() + "\n"
    golden("triton_select.py", own.replace(f"attnopt {VERSION}", "attnopt VERSION"))


def test_entries_are_as_the_text_has_them() -> None:
    made = _kernel(_spec(select=replace(SELECT, shared=True)))
    tree = ast.parse(made.source)
    functions = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    for entry in made.entries:
        assert [a.name for a in entry.arguments] == functions[entry.name]
    assert "CHOOSERS = tl.constexpr(2)" in made.source
    assert "SHARED = tl.constexpr(4)" in made.source
    kinds = {a.name: a.kind for entry in made.entries for a in entry.arguments}
    assert (kinds["x_ptr"], kinds["ranks_ptr"], kinds["chosen_ptr"]) == ("bfloat16", "int64", "uint8")


@pytest.mark.parametrize("chip", CHIPS if ALL else ["sm_90"])
def test_they_fit_the_chip(chip: str) -> None:
    made = _kernel(_spec(), chip)
    for entry in made.entries:
        found = compile_entry(made, entry, CHIPS[chip])
        assert found.problem is None, found.problem
        assert (found.spills or 0) <= 256, entry.name


@pytest.mark.parametrize(
    ("changes", "layout", "said"),
    [
        ({"select": None}, BF16, "chooses no blocks"),
        ({}, Layout("float64"), "no float64"),
        ({"heads": Heads(2, 2, 2, 300, 64)}, BF16, "300 wide"),
        (
            {"heads": Heads(4, 2, 2, 8, 8, (0, 1, 0, 1), (0, 1, 0, 1)), "select": replace(SELECT, shared=True)},
            BF16,
            "choose together",
        ),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_said(changes: dict[str, Any], layout: Layout, said: str) -> None:
    spec = _spec(**changes)
    assert said in str(supported_select(spec, layout))
    with pytest.raises(SpecError, match=said):
        emit_select(spec, layout, select_plans(CHIPS["sm_90"], "bfloat16", 64, 64)[0])
    assert select_plans(CHIPS["sm_90"], "float64", 64, 64) == ()
