"""How loads are addressed: contiguous, broadcast, strided, gathered."""

from __future__ import annotations

import pytest

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_loads import k_axes, step
from attnopt.expr import h, k, n_k, q
from attnopt.spec import AttentionSpec
from tests.specs import case


@pytest.mark.parametrize(
    ("index", "c"), [(k, 1), (k - q + 3, 1), (q - k + n_k, -1), (2 * k, 2), (h, 0), (ex.Mod(k, 3), None)]
)
def test_step(index: object, c: int | None) -> None:
    assert step(index) == c  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("bias", (2,)),
        ("line", (1,)),
        ("backward_line", (None,)),
        ("documents", (1,)),
        ("buckets", (None,)),
        ("gate", (None,)),
    ],
)
def test_axis_that_carries_the_key(name: str, axes: tuple[int | None, ...]) -> None:
    assert k_axes(case(name).spec) == axes


def _source(spec: AttentionSpec, stride: int | None) -> str:
    return cpp.emit(spec, Layout("float32", (CaptureLayout("float32", stride),))).source


def test_unit_stride_is_one_vector_load() -> None:
    assert "load_f<kRagged>(bias_row0 + (k0 + j), valid)" in _source(case("bias").spec, 1)


def test_stride_zero_is_read_once_per_row() -> None:
    assert "const float bias_0 = read_f(*bias_row0);" in _source(case("bias").spec, 0)


def test_any_stride_is_gathered_within_the_valid_lanes() -> None:
    source = " ".join(_source(case("bias").spec, None).split())
    assert "if (!kRagged || lane < valid) bias_" in source
    assert "[lane] = read_f(bias_row0[(k0 + j + lane) * a.bias_stride[2]]);" in source
