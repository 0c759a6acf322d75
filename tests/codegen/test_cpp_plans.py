"""Which schedule is chosen for which sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_plans import PLANS, Sizes, choose
from attnopt.spec import Heads
from tests.specs import case


@pytest.mark.parametrize(
    ("name", "sizes", "form"),
    [
        ("gqa", Sizes(1, 1, 8192), "stream"),
        ("gqa", Sizes(1, 4, 8192), "stream"),
        ("gqa", Sizes(1, 5, 8192), "tile"),
        ("gqa", Sizes(1, 1, 1), "stream"),
        ("scale", Sizes(1, 1, 2), "whole"),
        ("scale", Sizes(1, 1, 3), "stream"),
        ("head_table", Sizes(1, 1, 8192), "tile"),
        ("causal", Sizes(1, 2048, 2048), "tile"),
    ],
)
def test_form(name: str, sizes: Sizes, form: str) -> None:
    assert choose(case(name).spec, sizes, 8).form == form


def test_long_sequences_have_larger_tiles() -> None:
    spec = case("scale").spec
    assert choose(spec, Sizes(1, 2048, 2048), 8).block_k > choose(spec, Sizes(1, 128, 128), 8).block_k


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_plan_prints_for_every_width_of_vectors(lanes: int) -> None:
    spec = replace(case("gqa").spec, heads=Heads(8, 2, 2, 40, 24))
    for row in PLANS:
        kernel = cpp.emit(spec, Layout("bfloat16"), row.make(lanes))
        assert f"constexpr int kLanes = {lanes};" in kernel.source
        assert "@" not in kernel.source


def test_captures_do_not_matter() -> None:
    spec = case("bias").spec
    plan = choose(spec, Sizes(1, 1, 100), 8)
    assert "bias" in cpp.emit(spec, Layout("float32", (CaptureLayout("float32", 1),)), plan).source
