"""Where queries stand among keys, and windows around them."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.analysis.positions import WHOLE, each_head, last_key, windowed
from attnopt.expr import b, h, k, n_k, n_q, q

START = ex.scalar("start")


@pytest.mark.parametrize(
    ("keep", "want"),
    [
        (k <= q, q),
        (sp.And(k <= q, k > q - 20), q),
        (q >= k + n_q - n_k, q + n_k - n_q),
        (sp.And(k <= q + START, sp.Ne(ex.load("pad", b, k, integer=True), 0)), q + START),
        (sp.And(k <= q + ex.load("past", b, integer=True), k < 9), q + ex.load("past", b, integer=True)),
        (sp.true, None),
        (k < n_k - 3, None),
        (2 * k <= q, None),
        (k <= q + h, None),
        (sp.Or(k < 5, k <= q), None),
        (k >= q, None),
    ],
)
def test_the_last_key_of_a_query(keep: sp.Basic, want: sp.Expr | None) -> None:
    found = last_key(keep)
    assert found is None if want is None else sp.expand(found - want) == 0


def test_a_number_for_each_head() -> None:
    for numbers in ([7], [7, 7, 7], [1, 2, 2, 5], [WHOLE, 3, WHOLE]):
        made = each_head(numbers)
        assert [int(made.xreplace({h: sp.Integer(i)}).doit()) for i in range(len(numbers))] == numbers
    assert each_head([4, 4]) == 4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 2])
def test_the_window_by_hand(causal: bool, sinks: int) -> None:
    grid = Grid((1, 2, 12, 12), {})
    dense = grid.dense(windowed(q, each_head([5, 3]), sinks, causal))
    for head, size in enumerate((5, 3)):
        for row in range(12):
            for key in range(12):
                near = 0 <= row - key < size if causal else abs(row - key) <= size // 2
                want = near or key < sinks or (causal and key > row)
                assert bool(dense[0, head, row, key]) == want
