"""Which tables a mask needs, and what their ends say about a tile."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.blocks import EMPTY, FULL, PARTIAL
from attnopt.analysis.tables import Plan, Table, classes, plan
from attnopt.expr import b, h, k, n_k, n_q, q
from tests.analysis.keeps import data

_MASK, _LENGTH = data("mask", b, k), data("lengths", b)
_IDS = data("ids", b, q), data("ids", b, k)
PLANS = (
    ("static", k <= q, [], sp.true, True),
    ("row", sp.And(sp.Ne(_MASK, 0), k <= q), [Table(_MASK, "k", ("b",))], sp.Ne(_MASK, 0), True),
    ("documents", sp.Eq(*_IDS), [Table(_IDS[1], "k", ("b",)), Table(_IDS[0], "q", ("b",))], sp.true, True),
    ("lengths", k < _LENGTH, [Table(_LENGTH, "", ("b",))], ex.canon(k < _LENGTH), True),
    ("heads", sp.Ne(data("mask", h, k), 0), [Table(data("mask", h, k), "k", ("h",))], sp.Ne(data("mask", h, k), 0), True),
    ("dense", sp.And(sp.Ne(data("pair", q, k), 0), sp.Ne(_MASK, 0)), [Table(_MASK, "k", ("b",))], sp.Ne(_MASK, 0), False),
    ("nested", sp.Ne(data("mask", b, data("order", k)), 0), [Table(data("mask", b, data("order", k)), "k", ("b",))], None, True),
    ("either", sp.Or(sp.Ne(_MASK, 0), k <= q), [Table(_MASK, "k", ("b",))], sp.true, True),
)  # fmt: skip


@pytest.mark.parametrize(("name", "keep", "tables", "rows", "complete"), PLANS, ids=[p[0] for p in PLANS])
def test_plan(name: str, keep: sp.Basic, tables: list[Table], rows: sp.Basic | None, complete: bool) -> None:
    made = plan(keep)
    assert list(made.tables) == tables
    assert made.rows == (ex.canon(keep) if rows is None else rows)
    assert made.complete == complete


def _classes(made: Plan, ends: dict[Table, tuple[list[float], list[float]]]) -> list[list[int]]:
    arrays = {t: tuple(np.array(x, float).reshape(1, 1, -1) for x in pair) for t, pair in ends.items()}
    return classes(made, arrays, {n_q: 8, n_k: 8}, (4, 4)).classes[0, 0].tolist()  # type: ignore[arg-type]


def test_a_row_is_full_empty_or_mixed() -> None:
    made = plan(sp.Ne(_MASK, 0))
    assert _classes(made, {made.tables[0]: ([1, 0], [1, 1])}) == [[FULL, PARTIAL]] * 2
    assert _classes(made, {made.tables[0]: ([0, 1], [0, 1])}) == [[EMPTY, FULL]] * 2


def test_documents_meet_where_their_intervals_do() -> None:
    made = plan(sp.Eq(*_IDS))
    ends = {Table(_IDS[0], "q", ("b",)): ([0, 1], [0, 2]), Table(_IDS[1], "k", ("b",)): ([0, 2], [0, 3])}
    assert _classes(made, ends) == [[FULL, EMPTY], [EMPTY, PARTIAL]]


def test_without_a_table_a_tile_is_partial() -> None:
    made = plan(sp.And(sp.Ne(_MASK, 0), k <= q))
    assert _classes(made, {}) == [[PARTIAL, EMPTY], [PARTIAL, PARTIAL]]
