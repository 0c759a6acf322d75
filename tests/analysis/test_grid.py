"""Grids against plain arithmetic, entry by entry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.errors import SpecError
from attnopt.expr import b, h, k, n_k, n_q, q

GRID = Grid(
    (2, 2, 3, 4),
    {"ids": np.array([[0, 1, 1, 2], [5, 5, 5, 7]]), "bias": np.linspace(0, 1, 12).reshape(3, 4)},
    {"start": 2},
)
START, IDS = ex.scalar("start"), ex.load("ids", b, k, integer=True)
ROWS = (
    (k <= q + START, lambda b, h, q, k: k <= q + 2),
    (sp.Eq(ex.FloorDiv(k - 3, 2), ex.FloorDiv(q, 2) - 1), lambda b, h, q, k: (k - 3) // 2 == q // 2 - 1),
    (sp.Or(sp.Eq(ex.Mod(k - q, 3), 0), h < 1), lambda b, h, q, k: (k - q) % 3 == 0 or h < 1),
    (sp.Not(sp.Gt(IDS, q)), lambda b, h, q, k: GRID.captures["ids"][b, k] <= q),
    (ex.load("bias", q, k) > sp.Rational(1, 3), lambda b, h, q, k: GRID.captures["bias"][q, k] > 1 / 3),
    (sp.Abs(k - ex.Minimum(q, 1)) < ex.Maximum(1, n_k - n_q), lambda b, h, q, k: abs(k - min(q, 1)) < max(1, 1)),
    (ex.Where(k < 2, q, -k) > 0, lambda b, h, q, k: (q if k < 2 else -k) > 0),
    (sp.true, lambda b, h, q, k: True),
)


@pytest.mark.parametrize(("condition", "want"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_every_entry(condition: sp.Basic, want: object) -> None:
    dense = GRID.dense(condition)
    assert dense.shape == GRID.shape
    for place in itertools.product(*map(range, GRID.shape)):
        assert dense[place] == want(*place), place  # type: ignore[operator]


def test_a_load_outside_its_array_takes_the_nearest_element() -> None:
    assert GRID.value(ex.load("ids", b, k + 9, integer=True)).ravel().tolist() == [2, 2, 2, 2, 7, 7, 7, 7]


def test_what_no_grid_evaluates_is_an_error() -> None:
    with pytest.raises(SpecError, match="erf"):
        GRID.value(sp.erf(q))
