"""The text of the kernel of column mass and weights: golden, and refused where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from attnopt._version import VERSION
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_plans import backward_plan
from attnopt.codegen.cpp_side import emit_side, supported_side
from attnopt.errors import SpecError
from attnopt.spec import Capture
from tests.specs import case

PAD = Layout("bfloat16", (CaptureLayout("bool", 1),))


def test_the_golden_text(golden: Callable[[str, str], None]) -> None:
    made = emit_side(case("entropy_uniform").spec, PAD, backward_plan(8), source_note="model.py:12").source
    assert "@" not in made
    golden("cpp_side.cpp", made.replace(f"attnopt {VERSION}", "attnopt VERSION"))


def test_values_and_what_comes_after_weights_are_not_read() -> None:
    spec = case("gate").spec
    made = emit_side(spec, Layout("float32", (CaptureLayout("float32", 1),)), backward_plan(8)).source
    assert "kDv" not in made
    assert "a.gain[" not in made
    assert (
        "a.rows"
        not in emit_side(case("sigmoid").spec, Layout("float32"), backward_plan(8)).source.split("tensors++);")[0]
    )


@pytest.mark.parametrize(("name", "reason"), [("linear", "divisor"), ("plain", "pages")])
def test_what_it_refuses(name: str, reason: str) -> None:
    layout = Layout("float32", page=16 if reason == "pages" else 0)
    assert reason in str(supported_side(case(name).spec, layout))
    with pytest.raises(SpecError, match=reason):
        emit_side(case(name).spec, layout, backward_plan(8))


def test_names_that_the_text_has_already() -> None:
    spec = replace(
        case("padding").spec, captures=(Capture("pad", "int", (None, None)), Capture("mass", "float", (None,)))
    )
    layout = Layout("float32", (CaptureLayout("int64", 1), CaptureLayout("float32", 1)))
    assert "'mass'" in str(supported_side(spec, layout))
