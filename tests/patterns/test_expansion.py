"""What is multiplied out, and what would be too large."""

from __future__ import annotations

import sympy as sp

from attnopt.patterns.expansion import LIMIT, expanded

_XS = sp.symbols("x0:40")


def test_small_products_are_multiplied_out() -> None:
    a, b, c = _XS[:3]
    assert expanded((a + b) * (b + c)) == a * b + a * c + b**2 + b * c
    assert expanded(sp.exp((a + b) * c)) == sp.exp(a * c) * sp.exp(b * c)
    assert expanded((a + b) ** 3) == sp.expand((a + b) ** 3)
    assert expanded(a) == a


def test_large_ones_are_not() -> None:
    product = sp.Mul(*[x + 1 for x in _XS])
    assert expanded(product) is None
    assert expanded(1 + sp.exp(product)) is None
    assert expanded((_XS[0] + _XS[1]) ** (LIMIT + 7)) is None
    assert expanded(sp.Add(*_XS) ** 3) is None


def test_many_terms_in_one_sum_are_no_obstacle() -> None:
    assert expanded(sp.Add(*_XS)) == sp.Add(*_XS)
