"""Clauses that are one value for a whole block."""

from __future__ import annotations

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.coarse import Coarse, coarse
from attnopt.expr import b, h, k, q


def _map(*indices: sp.Expr) -> sp.Basic:
    return sp.Ne(ex.load("map", *indices, integer=True), 0)


def test_a_map_of_blocks_is_taken_out_of_the_mask() -> None:
    clause = _map(b, h, ex.FloorDiv(q, 32), ex.FloorDiv(k, 64))
    found, rest = coarse(sp.And(k <= q, clause))
    assert found == (Coarse(ex.canon(clause), 32, 64),)
    assert rest == ex.canon(k <= q)
    assert coarse(_map(q, ex.FloorDiv(k, 64)))[0][0].rows == 1, "a choice of each query"


def test_what_varies_inside_a_block_stays() -> None:
    for clause in (
        _map(b, k),  # keys alone have a table
        _map(q, k),
        _map(ex.FloorDiv(q, 32), ex.FloorDiv(k, 64) + ex.FloorDiv(k, 32)),
        _map(ex.FloorDiv(q, 32), ex.FloorDiv(k + 1, 64)),
        sp.Ge(ex.FloorDiv(q, 32) - ex.FloorDiv(k, 32), 0),
    ):
        found, rest = coarse(clause)
        assert found == ()
        assert rest == ex.canon(clause)
