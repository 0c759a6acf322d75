"""What a normaliser puts into the skeleton, and that nothing is spent on sums that nobody divides by."""

from __future__ import annotations

from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_normalizer import indent
from tests.specs import case


def _source(name: str) -> str:
    spec = case(name).spec
    return cpp.emit(spec, Layout("float32", tuple(CaptureLayout("float32", 1) for _ in spec.captures))).source


def test_absolute_values_are_summed_only_where_they_divide() -> None:
    assert "abs_(logit)" in _source("linear_absolute")
    assert "abs_(logit)" not in _source("linear")


def test_a_pointwise_kernel_has_no_maximum() -> None:
    assert "t.max" not in _source("relu")
    assert "t.max" in _source("scale")


def test_a_sink_starts_the_row() -> None:
    assert "t.max[r] = sink;" in _source("sink")
    assert "t.max[r] = -INFINITY;" in _source("causal")


def test_weights_wait_for_the_maximum() -> None:
    assert "p * load(t.w + r * kBlockK + j)" in _source("signed")
    assert "t.w" not in _source("scale")


def test_indent_moves_every_line() -> None:
    assert indent(["a", "b"], 2) == "  a\n  b"
