"""The text of a backward kernel: golden, and refused where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnopt import expr as ex
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_backward import emit_backward, undifferentiable
from attnopt.codegen.cpp_plans import backward_plan
from attnopt.errors import SpecError
from attnopt.spec import Capture
from tests.specs import case

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FLOATS = Layout("float32")
BIAS = Layout("float32", (CaptureLayout("float32", 1),))


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    kernel = emit_backward(case("bias").spec, BIAS, backward_plan(8), ["bias"], source_note="model.py:12")
    path = GOLDEN / "cpp_backward_bias.cpp"
    if request.config.getoption("--update-golden"):
        path.write_text(kernel.source)
    assert kernel.source == path.read_text(), "run `make golden` and review the difference"
    assert "@" not in kernel.source


def test_what_is_not_learned_costs_nothing() -> None:
    assert "grad_bias" not in emit_backward(case("bias").spec, BIAS, backward_plan(8)).source


def test_blocks_fit_the_register_tile_of_every_width() -> None:
    for lanes, block in ((4, 96), (8, 96), (16, 96)):
        assert f"kBlockK = {block};" in emit_backward(case("plain").spec, FLOATS, backward_plan(lanes)).source


@pytest.mark.parametrize(
    ("name", "reason"),
    [("head_table", "one head map"), ("softplus", "divisor"), ("gate", "whole row")],
)
def test_what_it_refuses(name: str, reason: str) -> None:
    spec = case(name).spec
    layout = Layout("float32", tuple(CaptureLayout("float32", None) for _ in spec.captures))
    learned = [c.name for c in spec.captures]
    assert reason in str(undifferentiable(spec, layout, learned))
    with pytest.raises(SpecError, match=reason):
        emit_backward(spec, layout, backward_plan(8), learned)


def test_names_of_its_own_arguments_are_refused() -> None:
    spec = replace(
        case("plain").spec, score=ex.s + ex.load("grad", ex.h), captures=(Capture("grad", "float", (None,)),)
    )
    assert "'grad'" in str(undifferentiable(spec, BIAS, []))
    assert "no float64" in str(undifferentiable(case("plain").spec, Layout("float64"), []))
