"""What a sparse attention is estimated to cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.select import Select
from attnopt.sparsify.cost import estimate, visited
from attnopt.spec import AttentionSpec, Heads

SPEC = AttentionSpec(Heads(4, 2, 2, 64, 64), keep=ex.k <= ex.q)
SELECT = Select("topk", (sp.Integer(4),), 64, 64, own=ex.q)


def _sizes(n_q: int, n_k: int) -> dict[sp.Symbol, int]:
    return {ex.n_b: 1, ex.n_h: 4, ex.n_q: n_q, ex.n_k: n_k}


def test_tiles_that_are_visited() -> None:
    one = 64 * 64 * 128
    assert visited(replace(SPEC, keep=sp.true), _sizes(256, 256)) == 16 * one
    assert visited(SPEC, _sizes(256, 256)) == 10 * one
    narrow = replace(SPEC, keep=sp.And(ex.k <= ex.q, ex.k > ex.q - 64 * (ex.h + 1)))
    assert visited(narrow, _sizes(256, 256)) == pytest.approx((7 + 9 + 10 + 10) / 4 * one)
    assert visited(SPEC, _sizes(512, 512), SELECT) == (1 + 2 + 3 + 4 * 5) * one
    assert visited(SPEC, _sizes(512, 512), SELECT, 0.5) == pytest.approx((1 + 1 + 1.5 + sum(range(4, 9)) / 2) * one)


def test_the_choice_costs_little_of_long_inputs_and_much_of_one_query() -> None:
    spec = replace(SPEC, select=SELECT)
    assert estimate(SPEC, 4096, 4096) == 0
    assert estimate(spec, 4096, 4096) < 0.01 * visited(SPEC, _sizes(4096, 4096))
    assert estimate(spec, 1, 4096) > 4096 * 128, "more than dense attention"
    assert estimate(replace(spec, select=replace(SELECT, shared=True)), 4096, 4096) < estimate(spec, 4096, 4096)
