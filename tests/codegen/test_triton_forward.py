"""The tiled forward: which loops there are, and what the kernel is called with."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton_forward import block_width, forward, forward_arguments, padded
from tests.codegen.test_triton import layout
from tests.specs import case


@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("plain", ["full_first, full_last, False", "full_last, last, True"]),
        ("causal", ["full_first, full_last, False", "full_last, last, True"]),
        ("window", ["first, full_first, True", "full_first, full_last, False", "full_last, last, True"]),
        ("dilated", ["first, last, True"]),
    ],
)
def test_only_loops_that_can_be_are_written(name: str, loops: list[str]) -> None:
    spec = case(name).spec.canonical()
    text, _ = forward(spec, layout(spec))
    assert [line.strip(" ,") for line in text.splitlines() if line.endswith(("True,", "False,"))] == loops


def test_widths_are_powers_of_two_from_16() -> None:
    assert [block_width(x) for x in (1, 16, 17, 64, 80, 256)] == [16, 16, 32, 64, 128, 256]
    assert [padded(x) for x in (8, 16, 40, 128)] == [True, False, True, False]


def test_arguments_in_order() -> None:
    spec = case("sink").spec
    given = forward_arguments(spec, layout(spec, "bfloat16"))
    assert [a.name for a in given[:6]] == ["q_ptr", "k_ptr", "v_ptr", "out_ptr", "sink_ptr", "lse_ptr"]
    assert [a.kind for a in given[:6]] == ["bfloat16"] * 4 + ["float32"] * 2
    assert [a.name for a in given if a.kind == "size"] == ["n_b", "n_q", "n_k"]
    last = [a.name for a in given if a.last and a.rows]
    assert last == ["q_stride3", "k_stride3", "v_stride3", "out_stride3"]


def test_heavy_tiles_come_first_where_the_mask_is_triangular() -> None:
    for name, reverse in (("causal", True), ("plain", False)):
        spec = case(name).spec.canonical()
        assert ("tiles - 1 - tile" in forward(spec, layout(spec))[0]) is reverse
