"""What fills the holes of the backward: slopes, masks, and what is known of a row."""

from __future__ import annotations

from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_backward_holes import fill_backward
from tests.specs import case


def holes(name: str, *learned: str) -> dict[str, str]:
    spec = case(name).spec
    return fill_backward(spec, Layout("float32", tuple(CaptureLayout("float32", None) for _ in spec.captures)), learned)


def test_a_slope_of_one_is_not_multiplied() -> None:
    assert "store(y + j, dlogit);" in holes("causal")["ELEMENT"]
    assert "select(kept, dlogit * " in holes("softcap")["ELEMENT"]


def test_sums_are_taken_again_under_a_softmax_alone() -> None:
    assert "Row settle(" in holes("sink")["SETTLE"]
    assert "VF top = splat_f(t.sink[q]);" in holes("sink")["SETTLE"]
    assert holes("sigmoid")["SETTLE"] == holes("sigmoid")["ALONE"] == ""


def test_a_gate_multiplies_the_gradient_of_the_result() -> None:
    assert holes("gate")["GATE_FACTOR"].startswith(" * ")
    assert " / " in holes("relu")["GATE_FACTOR"]
    assert holes("plain")["GATE_FACTOR"] == ""


def test_rows_without_keys() -> None:
    assert "t.uniform[d] += factor" in holes("empty_uniform")["KNOWN"]
    assert holes("empty_zero")["SPREAD"] == ""


def test_a_learned_sink_is_added_once_a_head() -> None:
    assert "if (first) {" in holes("sink", "sink")["KNOWN"]
    assert "if (first) {" not in holes("sink")["KNOWN"]
