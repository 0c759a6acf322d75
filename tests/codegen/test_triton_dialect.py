"""Expressions as Triton: literals, widths of integers, helpers."""

from __future__ import annotations

import struct

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_dialect import helpers, triton_float
from attnopt.codegen.triton_parts import printer_of
from attnopt.errors import SpecError
from tests.specs import case


def printed(expr: sp.Basic) -> str:
    printer = printer_of(case("offset").spec, Layout("float32"))
    value = printer.visit(expr)
    return "\n".join([*printer.row, *printer.body, value.code])


@pytest.mark.parametrize("value", [0.1, 1.0, -3.5, 1e-30, 3.4028234663852886e38, 0.17677669, 16777217.0])
def test_literals_read_back_to_the_same_bits(value: float) -> None:
    narrow = struct.unpack("f", struct.pack("f", value))[0]
    text = triton_float(narrow)
    assert struct.unpack("f", struct.pack("f", float(text)))[0] == narrow
    assert abs(float(text)) <= 3.4028234663852886e38  # Triton types anything larger as fp64
    assert triton_float(1e-40) == "0.0"


def test_a_product_of_coordinates_is_taken_in_64_bits() -> None:
    assert printed(ex.q * ex.n_k).count("tl.int64") == 2
    assert "int64" not in printed(7 * ex.q + ex.k)
    assert "int64" in printed(70 * ex.q)


def test_literals_need_no_cast() -> None:
    assert "cast(2" not in printed(ex.s + 2)
    assert printed(ex.Maximum(ex.s, 0)).endswith("maximum(s, 0.0)")


def test_what_is_free_of_keys_is_a_row() -> None:
    printer = printer_of(case("offset").spec, Layout("float32"))
    printer.visit(ex.s + (ex.q + ex.n_k) * 3)
    assert printer.row
    assert not printer.body


def test_floats_have_no_remainder() -> None:
    with pytest.raises(SpecError, match="remainder of floats"):
        printed(ex.Mod(ex.s, 3))


def test_only_helpers_that_are_called_are_written() -> None:
    assert list(helpers("tl.exp(x)")) == []
    names = [h.split("def ")[1].split("(")[0] for h in helpers("y = floor_mod(x, 7) + square(x)")]
    assert names == ["floor_div", "floor_mod", "square"]
    assert list(helpers("tl.maximum(x, y)")) == []
