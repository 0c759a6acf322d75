"""Row terms cancel where that is exact, and stay where it is not."""

from __future__ import annotations

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.expr import h, k, q, s
from attnopt.passes.bias_algebra import cancel_rows
from attnopt.spec import AttentionSpec, Capture, Heads, Softmax

HEADS = Heads(2, 2, 2, 4, 4)
ROWS = (
    ("row_number", s + q * 3, s),
    ("distance", s / 2 + (k - q) * 5, s / 2 + (k - q) * 5),
    ("balanced", s + 10000 * ex.load("m", ex.b, k, integer=True) - 10000, s + 10000 * ex.load("m", ex.b, k, integer=True) - 10000),
    ("constant", s + 7, s),
    ("nothing", s + k, s + k),
    ("dead_queries", s + ex.Where(q > 1, sp.Integer(-(10**38)), sp.S.Zero), s + ex.Where(q > 1, sp.Integer(-(10**38)), sp.S.Zero)),
    ("infinite", s + ex.Where(q > 1, ex.NEG_INF, sp.S.Zero), s + ex.Where(q > 1, ex.NEG_INF, sp.S.Zero)),
)  # fmt: skip


@pytest.mark.parametrize(("name", "score", "expected"), ROWS, ids=[r[0] for r in ROWS])
def test_row_terms(name: str, score: sp.Expr, expected: sp.Expr) -> None:
    found = cancel_rows(AttentionSpec(HEADS, score=score))
    assert found.canonical().score == AttentionSpec(HEADS, score=expected).canonical().score


def test_a_capture_that_nothing_loads_any_more_goes() -> None:
    spec = AttentionSpec(HEADS, score=s + ex.load("row", q, integer=True), captures=(Capture("row", "int", (None,)),))
    assert cancel_rows(spec).captures == ()


@pytest.mark.parametrize("changes", [{"returns": ("lse",)}, {"normalizer": Softmax(h)}], ids=["lse", "sink"])
def test_not_where_the_total_matters(changes: dict[str, object]) -> None:
    spec = AttentionSpec(HEADS, score=s + q, **changes)  # type: ignore[arg-type]
    assert cancel_rows(spec) is spec


def test_a_loaded_float_may_be_infinite_and_stays() -> None:
    spec = AttentionSpec(HEADS, score=s + ex.load("row", q), captures=(Capture("row", "float", (None,)),))
    assert cancel_rows(spec) is spec
