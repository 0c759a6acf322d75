"""The text of the chunked linear kernel: what it is specialised for, and what it refuses."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_linear import emit_linear, supported_linear
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, Heads, Pointwise

FP32 = Layout("float32")


def _spec(divide: sp.Expr = sp.S.One) -> AttentionSpec:
    return AttentionSpec(Heads(4, 2, 4, 8, 6), ex.s, sp.Ge(ex.q - ex.k, 0), Pointwise(divide)).canonical()


def _source(spec: AttentionSpec, layout: Layout = FP32, lanes: int = 8) -> str:
    form = linear_form(spec)
    assert form is not None
    return emit_linear(spec, form, layout, lanes).source


def test_it_is_specialised() -> None:
    source = _source(_spec(ex.t + 1), lanes=4)
    assert "kCausal = true, kDecay = false" in source
    assert "kHeads = 4, kD = 8, kDv = 6, kRows = 4" in source
    assert "return h / 2;" in source
    computed = source.split("const float total = t.total[r];")[1].split("const float divisor")[0]
    assert "total" in computed
    assert "@" not in source
    assert "typedef half Element" in _source(_spec(), Layout("float16"))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_all_dimensions_are_whole_vectors_and_whole_blocks(lanes: int) -> None:
    source = _source(_spec(), lanes=lanes)
    numbers = dict(part.split(" = ") for line in source.split("\n") if line.startswith("constexpr int k")
                   for part in line.removeprefix("constexpr int ").split(";")[0].split(", "))  # fmt: skip
    depth, width, rows = (int(numbers[name]) for name in ("kDepth", "kWidth", "kRows"))
    assert depth % lanes == width % lanes == 0
    assert int(numbers["kStateRows"]) % rows == int(numbers["kPadded"]) % rows == 0


def test_what_it_refuses() -> None:
    assert "no float64" in str(supported_linear(_spec(), Layout("float64")))
    absolute = _spec(ex.Maximum(ex.a, sp.S.One))
    assert "sum of its weights alone" in str(supported_linear(absolute, FP32))
    form = linear_form(_spec())
    assert form is not None
    with pytest.raises(SpecError, match="no float64"):
        emit_linear(_spec(), form, Layout("float64"), 8)
