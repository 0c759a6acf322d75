"""Scales that can be folded into q, and those that cannot."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.cpp_holes import scaled
from attnopt.expr import k, s

_BIAS = ex.load("bias", k)
_EIGHTH = sp.Rational(1, 8)


@pytest.mark.parametrize(
    ("score", "scale", "rest"),
    [
        (s, 1, s),
        (s / 8, _EIGHTH, s),
        (s / 8 + _BIAS, _EIGHTH, s + _BIAS),
        (20 * sp.tanh(s / 8), _EIGHTH, 20 * sp.tanh(s)),
        (s / 8 + s / 4 * _BIAS, 1, s / 8 + s / 4 * _BIAS),
        (s * _BIAS, 1, s * _BIAS),
        (s**2 / 8, 1, s**2 / 8),
        (ex.Where(sp.Ge(k, 3), s / 8, 0), _EIGHTH, ex.Where(sp.Ge(k, 3), s, 0)),
    ],
)
def test_scaled(score: sp.Expr, scale: sp.Expr, rest: sp.Expr) -> None:
    assert scaled(score) == (scale, rest)
