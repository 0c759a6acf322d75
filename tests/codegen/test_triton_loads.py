"""Loads in Triton: 64-bit offsets, rows once, masks for the tail and for guards."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_parts import printer_of
from attnopt.spec import AttentionSpec, Capture, Heads
from tests.specs import case


def printed(
    score: sp.Expr, rank: int, kind: str = "float", about: CaptureLayout | None = None
) -> tuple[list[str], list[str]]:
    about = about or CaptureLayout("float32" if kind == "float" else "int64", 1)
    spec = AttentionSpec(
        Heads(4, 4, 4, 16, 16), score=score, captures=(Capture("x", kind, (None,) * rank),)
    ).canonical()
    printer = printer_of(spec, Layout("float32", (about,)))
    printer.visit(spec.score)
    return printer.row, printer.body


def test_a_row_is_addressed_once_and_in_64_bits() -> None:
    row, body = printed(ex.s + ex.load("x", ex.h, ex.q, ex.k), 3)
    assert row == ["x_row0 = x_ptr + tl.cast(h, tl.int64) * x_stride0 + tl.cast(q, tl.int64) * x_stride1"]
    assert body == ["x_0 = load_keys(x_row0 + k, valid)"]


def test_a_value_of_a_row_is_loaded_once() -> None:
    row, body = printed(ex.s * ex.load("x", ex.h), 1)
    assert row == ["x_0 = tl.load(x_ptr + tl.cast(h, tl.int64) * x_stride0)"]
    assert not body


def test_strides_along_keys() -> None:
    load = ex.s + ex.load("x", ex.q, ex.k)
    assert printed(load, 2, about=CaptureLayout("float32", None))[1] == [
        "x_0 = load_keys(x_row0 + tl.cast(k, tl.int64) * x_stride1, valid)"
    ]
    row, body = printed(load, 2, about=CaptureLayout("float32", 0))
    assert row[-1].startswith("x_0 = tl.load(")
    assert not body


@pytest.mark.parametrize(("dtype", "cast"), [("bfloat16", "tl.float32"), ("float64", "tl.float32"), ("float32", None)])
def test_floats_are_widened(dtype: str, cast: str | None) -> None:
    row, _ = printed(ex.s * ex.load("x", ex.h), 1, about=CaptureLayout(dtype, None))
    assert (cast in row[0].removesuffix(")")) if cast else "tl.float32" not in row[0]


def test_a_guard_masks_the_load() -> None:
    _, body = printed(ex.s + ex.Where(ex.k <= ex.q, ex.load("x", ex.q - ex.k), 1), 1)
    assert any("load_where(x_row0 + -1 * tl.cast(k, tl.int64) * x_stride0, test0, valid)" in line for line in body)


def test_an_index_that_is_not_affine_is_a_value() -> None:
    _, body = printed(case("buckets").spec.score.xreplace({sp.Symbol("table"): sp.Symbol("x")}), 2)
    assert any("tl.int64) * x_stride0" in line and "load_keys" in line for line in body)
