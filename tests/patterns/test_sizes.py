"""Symbolic sizes in the functions of specs: the same numbers as torch's own functions give."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from torch.utils._sympy import functions as tf

from attnopt.expr import FloorDiv, Maximum, Minimum, Mod
from attnopt.patterns.sizes import known, shape, size
from tests.modules import captured

n, m = sp.symbols("n m", integer=True, positive=True)
ROWS = (
    (tf.FloorDiv(n, 2), FloorDiv(n, sp.Integer(2))),
    (tf.FloorDiv(n + m, 3) * 2 + 1, FloorDiv(n + m, sp.Integer(3)) * 2 + 1),
    (tf.PythonMod(n, 3), Mod(n, sp.Integer(3))),
    (tf.Mod(n, 3), Mod(n, sp.Integer(3))),
    (tf.Max(n, 7), Maximum(n, sp.Integer(7))),
    (tf.Min(n, tf.FloorDiv(m, 2)), Minimum(n, FloorDiv(m, sp.Integer(2)))),
    (tf.OpaqueUnaryFn_sqrt(tf.ToFloat(n)), sp.sqrt(n)),
    (n * m + 1, n * m + 1),
)


@pytest.mark.parametrize(("given", "expected"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_torch_functions_by_their_names_here(given: sp.Expr, expected: sp.Expr) -> None:
    found = known(given)
    assert found == expected or {*found.args} == {*expected.args}
    for values in ({n: 5, m: 9}, {n: 12, m: 4}):
        here, there = (sp.sympify(e.subs(values)).evalf() for e in (found, given))
        assert here == there


def test_numbers_are_themselves() -> None:
    assert size(7) == 7
    node = next(iter(captured(lambda x: x + 1, torch.ones(3, 4)).gm.graph.nodes))
    assert shape(node) == [3, 4]
