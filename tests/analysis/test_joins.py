"""Masks by data and joined masks: dense masks and words."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp

from attnopt.analysis.grid import Array, Grid
from attnopt.analysis.joins import All, Any, Compare, Dense, Formula, Not, Queries, Row
from attnopt.analysis.parts import Band, Part, Span
from attnopt.expr import b, h, k, q
from tests.analysis.keeps import data

_IDS, _ROW = np.array([[0, 0, 1, 1], [0, 1, 1, 2]]), np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
GRID = Grid((2, 1, 4, 4), {"ids": _IDS, "row": _ROW, "pair": np.eye(4, dtype=int)})
_CAUSAL = np.tril(np.ones((4, 4), bool))
_SAME = (_IDS[:, :, None] == _IDS[:, None, :])[:, None]
_KEPT = _ROW[:, None, None, :].astype(bool)
_KEEP, _FIRST = Row(sp.Ne(data("row", b, k), 0)), Span(None, sp.Integer(2))
ROWS: tuple[tuple[Part, Array, str], ...] = (
    (Compare("==", data("ids", b, q), data("ids", b, k)), _SAME, "the same document (ids[b, q] == ids[b, k])"),
    (Compare("!=", data("ids", b, q), data("ids", b, k)), ~_SAME, "another document (ids[b, q] != ids[b, k])"),
    (
        Compare("<", data("ids", b, q), data("ids", b, k)),
        (_IDS[:, None, :] < _IDS[:, :, None])[:, None],
        "ordered by data (ids[b, k] < ids[b, q])",
    ),
    (
        Compare("<=", q, data("ids", b, k)),
        (_IDS[:, None] <= np.arange(4)[:, None])[:, None],
        "by data (ids[b, k] <= q)",
    ),
    (_KEEP, _KEPT, "not padding (row[b, k])"),
    (Queries(q >= 2), np.arange(4)[:, None] >= 2, "only for queries with q >= 2"),
    (Queries(h < 3), np.ones((4, 4), bool), "only for rows with h < 3"),
    (Dense(sp.Ne(data("pair", q, k), 0)), np.eye(4, dtype=bool), "arbitrary data (pair[q, k])"),
    (Formula(q * k < 4), np.outer(range(4), range(4)) < 4, "arbitrary: k*q < 4"),
    (Not(Band()), ~_CAUSAL, "not (causal (top-left))"),
    (Not(Band(left=sp.S.Zero)), ~np.eye(4, dtype=bool), "every position but the query's own"),
    (All((Band(), _KEEP)), _CAUSAL & _KEPT, "causal (top-left), and not padding (row[b, k])"),
    (Any((Band(), _FIRST)), _CAUSAL | (np.arange(4) < 2), "prefix-LM: causal (top-left), or the first 2 keys"),
    (
        All((_KEEP, Any((_FIRST, Band(left=sp.S.One))))),
        _KEPT & ((np.arange(4) < 2) | (_CAUSAL & ~np.tril(_CAUSAL, -2))),
        "not padding (row[b, k]), and (the first 2 keys, or (causal (top-left), and within a window of 1 key to the left))",
    ),
    (All(), np.ones((4, 4), bool), "all keys"),
    (Any(), np.zeros((4, 4), bool), "no key"),
)


@pytest.mark.parametrize(("part", "want", "words"), ROWS, ids=[r[2][:40] for r in ROWS])
def test_part(part: Part, want: Array, words: str) -> None:
    np.testing.assert_array_equal(part.dense(GRID), np.broadcast_to(want, GRID.shape))
    assert str(part) == words


def test_a_long_formula_is_cut() -> None:
    text = str(Formula(sp.And(*(sp.Gt(q * k * i + k**2, i) for i in range(2, 40)))))
    assert len(text) < 250
    assert text.endswith("...")
