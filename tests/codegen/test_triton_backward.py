"""The gradients' kernels: what is declined, what is learned, what the text holds."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from attnopt import expr as ex
from attnopt._version import VERSION
from attnopt.codegen import triton
from attnopt.codegen.triton_backward import undifferentiable
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import SpecError
from attnopt.spec import Pointwise
from tests.codegen.test_triton import layout
from tests.specs import case

PLAN = TritonPlan(32, 32, 4, 2)


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "guarded", "empty_uniform", "gate", "width_40"])
def test_text_is_python(name: str) -> None:
    spec = case(name).spec
    made = triton.emit_backward(spec, layout(spec, "bfloat16"), PLAN)
    assert "backward" in (ast.get_docstring(ast.parse(made.source)) or "")
    assert [e.name for e in made.entries] == ["attention_delta", "attention_dkv", "attention_dq"]


def test_text_is_golden(golden: object) -> None:
    spec = case("bias").spec
    made = triton.emit_backward(spec, layout(spec), PLAN, ("bias",))
    golden("triton_backward_bias.py", made.source.replace(f"attnopt {VERSION}", "attnopt VERSION"))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "change", "learned", "reason"),
    [
        ("plain", {"normalizer": Pointwise(ex.Maximum(ex.t, 1))}, (), "divisor"),
        ("gate", {}, ("gain",), "no gradient of gain"),
    ],
)
def test_what_has_no_kernel_is_said(name: str, change: dict, learned: tuple[str, ...], reason: str) -> None:  # type: ignore[type-arg]
    spec = replace(case(name).spec, **change)
    assert reason in (undifferentiable(spec.canonical(), learned) or "")
    with pytest.raises(SpecError, match=reason):
        triton.emit_backward(spec, layout(spec), PLAN, learned)


def test_heads_that_are_read_out_of_order_are_added_up_by_the_launcher() -> None:
    made = triton.emit_backward(case("head_table").spec, layout(case("head_table").spec), PLAN).source
    assert "KEY_READERS = [[0, 4], [2, 3], [1]]" in made
    assert "VALUE_READERS = [[1, 2], [0, 3, 4]]" in made
    assert "for member in range" not in made
    runs = triton.emit_backward(case("gqa").spec, layout(case("gqa").spec), PLAN).source
    assert "READERS" not in runs
    assert "for member in range" in runs


def test_a_score_without_a_derivative_is_declined() -> None:
    spec = replace(case("plain").spec, score=ex.Maximum(ex.s, 0) ** 2 + ex.Mod(ex.Trunc(ex.s), 3) * ex.s)
    assert "no rule" in (triton.supports_backward(spec, layout(spec)) or "no rule")
