"""The readable form of expressions."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.expr import b, h, k, n_k, n_q, q, s
from attnopt.readable import show

PAD = ex.load("pad", b, k, integer=True)
BIAS = ex.load("bias", h, q, k)
SHOWN = (
    (s / 8 + BIAS, "s/8 + bias[h, q, k]"),
    (sp.And(k <= q, sp.Ne(PAD, 0)), "k <= q and pad[b, k]"),
    (sp.Or(k < 4, k <= q), "k <= 3 or k <= q"),
    (k <= q + n_k - n_q, "k + n_q <= n_k + q"),
    (ex.load("slope", h) * (k - q), "(k - q)*slope[h]"),
    (sp.Eq(ex.FloorDiv(q, 7), ex.FloorDiv(k, 7)), "q//7 == k//7"),
    (30 * sp.tanh(s / 30), "30*tanh(s/30)"),
    (ex.NEG_INF, "-inf"),
    (sp.Eq(PAD, 0), "not pad[b, k]"),
)


@pytest.mark.parametrize(("expr", "text"), SHOWN, ids=[t for _, t in SHOWN])
def test_readable_form(expr: sp.Basic, text: str) -> None:
    assert show(ex.canon(expr)) == text
