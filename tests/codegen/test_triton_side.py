"""Kernels of column mass and weights: their text, and what has none."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest

from attnopt._version import VERSION
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_side import emit_side, supported_side
from attnopt.errors import SpecError
from attnopt.spec import Capture
from tests.codegen.test_triton import layout
from tests.specs import case

PLAN = TritonPlan(32, 32, 4, 2)


def test_text_is_golden(golden: Callable[[str, str], None]) -> None:
    spec = case("entropy_uniform").spec
    made = emit_side(spec, layout(spec, "bfloat16"), PLAN, "model.py:12").source
    golden("triton_side.py", made.replace(f"attnopt {VERSION}", "attnopt VERSION"))


@pytest.mark.parametrize("name", ["plain", "window", "guarded", "sigmoid", "routed", "sink", "head_table", "relu"])
def test_text_is_python(name: str) -> None:
    spec = case(name).spec
    made = emit_side(spec, layout(spec), PLAN)
    ast.parse(made.source)
    assert [e.name for e in made.entries] == ["attention_columns", "attention_weights"]
    assert made.kind == "side"
    assert "v_ptr" not in made.source


def test_side_outputs_and_gates_do_not_change_it() -> None:
    spec = case("gate").spec
    assert emit_side(replace(spec, returns=("lse",)), layout(spec), PLAN) == emit_side(spec, layout(spec), PLAN)
    assert "gain_ptr +" not in emit_side(spec, layout(spec), PLAN).source


def test_what_has_no_kernel_is_said() -> None:
    spec = case("linear").spec
    assert "divisor is made from them" in (supported_side(spec, layout(spec)) or "")
    with pytest.raises(SpecError, match="divisor"):
        emit_side(spec, layout(spec), PLAN)
    taken = replace(
        case("padding").spec, captures=(Capture("pad", "int", (None, None)), Capture("rows", "float", (None,)))
    )
    assert "'rows'" in (supported_side(taken, layout(taken)) or "")
    paged = replace(layout(case("plain").spec), page=16)
    assert "pages" in (supported_side(case("plain").spec, paged) or "")
