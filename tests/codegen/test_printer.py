"""One row per node: the printed text, its kind and its rank."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_dialect import CPP
from attnopt.codegen.cpp_loads import CppLoader
from attnopt.codegen.printer import Printer, Value, integer
from attnopt.errors import SpecError
from attnopt.expr import h, k, q, s
from attnopt.spec import AttentionSpec, Capture, Heads

SPEC = AttentionSpec(
    Heads(2, 2, 2, 8, 8),
    score=s + ex.load("bias", h, q, k) + ex.load("slope", h),
    captures=(Capture("bias", "float", (None,) * 3), Capture("slope", "float", (None,))),
)
LAYOUT = Layout("float32", (CaptureLayout("float32", 1), CaptureLayout("float32", None)))


def printer() -> Printer:
    symbols = {x: Value(x.name, "i") for x in (ex.b, h, q, *ex.SIZES)}
    symbols |= {k: Value("k", "i", True), s: Value("s", "f", True)}
    return Printer(CPP, symbols, CppLoader(SPEC, LAYOUT))


ROWS = [
    (s / 8, "(splat_f(0.125f) * s)", "f", True),
    (k + 3, "(splat_i(3) + k)", "i", True),
    (s + k, "(to_float(k) + s)", "f", True),
    (sp.Ge(q - k, 0), "to_bool(splat_i(q) >= k)", "b", True),
    (sp.Not(sp.Eq(k, 3), evaluate=False), "not_(to_bool(k == splat_i(3)))", "b", True),
    (ex.Maximum(s, 1), "maximum(s, splat_f(float(1)))", "f", True),
    (ex.Trunc(s), "to_int(trunc_(s))", "i", True),
    (sp.Abs(s), "abs_(s)", "f", True),
    (sp.sign(s), "sign_(s)", "f", True),
    (s**2, "t0", "f", True),
    (q, "q", "i", False),
    (sp.true, "true", "b", False),
    (sp.oo, "INFINITY", "f", False),
    (ex.number(-3.4028234663852886e38), "(-3.40282347e+38f)", "f", False),
    (ex.number(1e300), "INFINITY", "f", False),
    (sp.Rational(1, 3), "0.333333343f", "f", False),
]


@pytest.mark.parametrize(("expr", "code", "kind", "vector"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_row(expr: sp.Basic, code: str, kind: str, vector: bool) -> None:
    assert printer().visit(expr) == Value(code, kind, vector)


def test_every_node_has_a_row_or_is_handled() -> None:
    assert {*CPP.rows, ex.Where, ex.Load, ex.IntLoad} >= ex.KNOWN


def test_what_is_free_of_the_key_is_printed_once_per_row() -> None:
    p = printer()
    value = p.visit(s + sp.log(q + 2))
    assert value == Value("(splat_f(row1) + s)", "f", True)
    assert p.row == ["const int64_t row0 = 2 + q;", "const float row1 = log_(float(row0));"]
    assert p.body == []


def test_a_repeated_function_is_named_once() -> None:
    p = printer()
    p.visit(sp.tanh(s) + sp.tanh(s) ** 2)
    assert p.body == ["const VF t0 = tanh_(s);", "const VF t1 = square_(t0);"]


def test_loads_under_a_test_are_guarded() -> None:
    p = printer()
    p.visit(ex.Where(sp.Ge(k, 2), ex.load("bias", h, q, k - 2), 0))
    assert any("lane_(test0, lane)" in line for line in p.body)


def test_long_integers_are_long() -> None:
    assert integer(2**31) == Value("2147483648", "l")
    assert integer(-5) == Value("(-5)", "i")


def test_nan_and_unknown_nodes_are_refused() -> None:
    with pytest.raises(SpecError, match="not a number"):
        printer().visit(sp.nan)
    with pytest.raises(SpecError, match="no row prints"):
        printer().visit(sp.gamma(s))
