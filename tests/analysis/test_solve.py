"""Masks solved for the key, against the mask itself, and the solutions of the usual ones."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings

from attnopt import expr as ex
from attnopt.analysis.grid import Array, Grid
from attnopt.analysis.solution import ALL, NOTHING, Below, Both, Either, From, Leaf, Node
from attnopt.analysis.solve import solve
from attnopt.expr import FloorDiv, Mod, b, k, n_k, n_q, q
from tests.analysis.keeps import KEEPS, data, grids


def _dense(node: Node, grid: Grid) -> Array:
    if isinstance(node, (Both, Either)):
        join = np.all if isinstance(node, Both) else np.any
        start = np.full(grid.shape, isinstance(node, Both))
        return join([start, *(_dense(n, grid) for n in node.parts)], axis=0)  # type: ignore[operator]
    if isinstance(node, Leaf):
        return grid.dense(node.condition)
    found = k >= node.lo if isinstance(node, From) else k < node.hi
    return grid.dense(found)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(KEEPS, grids())
def test_a_solution_is_the_mask(keep: sp.Basic, grid: Grid) -> None:
    np.testing.assert_array_equal(_dense(solve(keep), grid), grid.dense(keep), err_msg=f"{keep}: {solve(keep)}")


_BLOCK = 4 * FloorDiv(q, 4)
SOLUTIONS = (
    (sp.true, ALL),
    (sp.false, NOTHING),
    (k <= q, Below(q + 1)),
    (k > q - 3, From(q - 2)),
    (k < n_k + q, ALL),
    (k > q - n_q, ALL),
    (k >= n_k + q, NOTHING),
    (3 * k <= q, Below(FloorDiv(q, 3) + 1)),
    (2 * k > q, From(FloorDiv(q, 2) + 1)),
    (sp.Rational(1, 2) * k <= q, Below(2 * q + 1)),
    (sp.Eq(FloorDiv(k, 4), FloorDiv(q, 4)), Both((From(_BLOCK), Below(_BLOCK + 4)))),
    (sp.Abs(k - q) > 2, Either((From(q + 3), Below(q - 2)))),
    (k < data("lengths", b), Below(data("lengths", b))),
    (k >= ex.Maximum(0, q - 3), From(q - 3)),
    (sp.Ge(q - 3, 0), Leaf(sp.Ge(q - 3, 0))),
    (sp.Eq(Mod(k, 4), 5), NOTHING),
    (Mod(k, 4) <= 3, ALL),
    (sp.Ne(Mod(k, 4), 4), ALL),
)


@pytest.mark.parametrize(("keep", "want"), SOLUTIONS, ids=[str(s[0]) for s in SOLUTIONS])
def test_solutions(keep: sp.Basic, want: Node) -> None:
    assert solve(keep) == want


def test_floats_are_left_alone() -> None:
    keep = ex.canon(k <= ex.load("x", q))
    assert solve(keep) == Leaf(keep)
