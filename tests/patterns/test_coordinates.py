"""Indices in the coordinates of a site: named only where they are them at every place that matters."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
import torch
import torch.nn.functional as F

from attnopt import expr as ex
from attnopt.patterns.coordinates import Axes, Coordinate, fit, places
from attnopt.patterns.grids import Positions, Unproven
from attnopt.patterns.traces import Tracer
from tests.modules import captured

X = torch.randn(2, 4, 12, 6)


def _axes(columns: int = 5) -> Axes:
    return Axes(captured(lambda x: x * 1, X).gm.graph.output_node().args[0][0], columns)


def test_an_index_is_a_coordinate_a_number_or_unknown() -> None:
    axes = _axes()
    batch, _, row, _ = axes.coordinates
    every, size = axes.everywhere, sp.Integer(12)
    assert fit(row.at, every, size, axes.coordinates) == row.expr
    assert fit(batch.at, every, size, [row]) is None
    assert fit(row.at * 0 + 3, every, size, axes.coordinates) == 3
    assert fit(row.at, every, sp.S.One, axes.coordinates) == 0
    assert fit(row.at + axes.columns, every, size, axes.coordinates) is None


def test_only_places_that_hold_matter() -> None:
    axes = _axes()
    row, first = axes.coordinates[2], axes.columns.at == 0
    assert fit(row.at + axes.columns, first, sp.Integer(12), axes.coordinates) == row.expr
    assert fit(row.at + axes.columns, axes.columns.at <= 1, sp.Integer(12), axes.coordinates) is None


def test_chunks_folded_heads_and_groups_of_heads_are_coordinates_too() -> None:
    axes = _axes()
    softmax = captured(lambda x: x.view(8, 3, 4, 6).softmax(-1), X).gm.graph.output_node().args[0][0]
    known = {c.expr: c.at for c in axes.derived(2, softmax)}
    b, h, q, _ = (c.expr for c in axes.coordinates)
    assert known[b * 4 + h].at.shape[:2] == (2, 4)
    assert known[ex.FloorDiv(q, 4)].at.ravel().tolist() == [i // 4 for i in range(12)]
    assert known[ex.Mod(q, 3)].at.ravel().tolist() == [i % 3 for i in range(12)]
    assert known[ex.FloorDiv(h, 2)].at.ravel().tolist() == [0, 0, 1, 1]


def test_a_matrix_of_rows_and_columns_depends_on_nothing_else() -> None:
    axes = _axes()
    found = axes.matrix(axes.coordinates[2].at + axes.columns, 2)
    assert np.array_equal(found, np.arange(12)[:, None] + np.arange(5))
    assert np.array_equal(axes.spread(found, 2).squeeze(), found)
    assert axes.spread(np.zeros((12, 5), dtype=int), 2).shape == (1, 1, 1, 1, 5, 1)
    assert axes.matrix(Positions(np.zeros((2, 4, 1, 1, 1, 1), dtype=int)), 2).shape == (12, 5)
    with pytest.raises(Unproven, match="differs between heads"):
        axes.matrix(axes.coordinates[1].at, 2)


def test_the_deepest_node_that_all_pieces_pass_is_named() -> None:
    node = (
        captured(lambda x: torch.cat([F.pad(x, (0, 0, 1, 0))[:, :, :6], x[:, :, 5:]], 2), X)
        .gm.graph.output_node()
        .args[0][0]
    )
    axes = Axes(node, 1)
    index = tuple(c.at for c in axes.coordinates)
    pieces = [p for p in Tracer().pieces(node, index, axes.everywhere) if p.number is None]
    b, h, q, d = axes.coordinates
    found = places(pieces, [*axes.coordinates, Coordinate(q.at - 1, ex.k)])
    assert found is not None
    assert found[0].op == "placeholder"
    assert found[1] == (b.expr, h.expr, ex.k, d.expr)
    assert places(pieces, [b, h, d]) is None
    spare = places(pieces, [b, h, d], spare=1)
    assert spare is not None
    assert spare[1] == (b.expr, h.expr, None, d.expr)
