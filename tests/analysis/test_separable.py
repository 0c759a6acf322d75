"""Which terms of a score factor, and into what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.separable import Split, operations, split
from attnopt.expr import b, h, k, n_q, q, s
from attnopt.spec import AttentionSpec, Capture, Heads, Softmax

SLOPE, TABLE, LINE = ex.load("slope", h), ex.load("table", h, q, k), ex.load("line", h, k - q + n_q - 1)
CAPTURES = (
    Capture("slope", "float", (None,)), Capture("table", "float", (None,) * 3), Capture("line", "float", (None,) * 2),
    Capture("mask", "float", (None,) * 2), Capture("row", "float", (None,) * 2), Capture("keys", "float", (None,) * 2),
)  # fmt: skip
_Q, _K, _MASK = ex.load("row", h, q), ex.load("keys", h, k), ex.load("mask", b, k)


def _spec(bias: sp.Expr, keep: sp.Basic = sp.true, **more: object) -> AttentionSpec:
    spec = AttentionSpec(Heads(4, 4, 4, 8, 8), score=s / 2 + bias, keep=keep, captures=CAPTURES)
    return replace(spec, **more).canonical()


# bias, keep, rank, table, rest
FORMS = [
    (SLOPE * (k - q), sp.true, 1, 0, 0),
    (-SLOPE * sp.Abs(q - k), k <= q, 1, 0, 0),
    (-SLOPE * sp.Abs(q - k), sp.true, 0, 0, -SLOPE * sp.Abs(q - k)),
    (SLOPE * (k - q) ** 2, sp.true, 2, 0, 0),
    ((k - q) ** 3, sp.true, 3, 0, 0),
    (sp.sin(q) * sp.exp(k / 3), sp.true, 1, 0, 0),
    (_Q + _K, sp.true, 1, 0, 0),
    (_Q * _K, sp.true, 1, 0, 0),
    (TABLE, sp.true, 0, TABLE, 0),
    (SLOPE * TABLE + k * SLOPE, sp.true, 1, SLOPE * TABLE, 0),
    (LINE, sp.true, 0, 0, LINE),
    (_MASK, sp.true, 0, 0, _MASK),
    (ex.load("mask", q, k) + _MASK, sp.true, 0, ex.load("mask", q, k), _MASK),
]


@pytest.mark.parametrize(("bias", "keep", "rank", "table", "rest"), FORMS, ids=lambda x: str(x)[:40])
def test_parts_of_a_score(bias: sp.Expr, keep: sp.Basic, rank: int, table: sp.Expr, rest: sp.Expr) -> None:
    spec = _spec(bias, keep)
    parts = split(spec)
    assert isinstance(parts, Split)
    assert parts.scale == sp.Rational(1, 2)
    assert (len(parts.pairs), sp.expand(parts.table - table), sp.expand(parts.rest - rest)) == (rank, 0, 0)
    whole = sp.expand(parts.scale * s + parts.separable + parts.table + parts.rest - spec.score)
    assert whole == 0
    for f, g in parts.pairs:
        assert not ex.depends(f, k)
        assert not ex.depends(g, q)
    # What the pairs leave out is the same for every key of a row.
    left = sp.expand(parts.separable - sum(f * g for f, g in parts.pairs))
    if sp.Abs not in {type(x) for x in sp.preorder_traversal(left)}:
        assert not ex.depends(left, k)


def test_terms_of_rows_stay_where_something_sees_them() -> None:
    bias = SLOPE * (k - q)
    with_lse, with_sink = _spec(bias, returns=("lse",)), _spec(bias, normalizer=Softmax(SLOPE))
    for spec in (with_lse, with_sink):
        parts = split(spec)
        assert isinstance(parts, Split)
        assert sp.expand(sum(f * g for f, g in parts.pairs) - bias) == 0


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (20 * sp.tanh(s / 20) + SLOPE * k, "plain product"),
        (SLOPE * s + k, "plain product"),
        (s * s + s, "plain product"),
    ],
)
def test_scores_that_are_no_sum(score: sp.Expr, reason: str) -> None:
    found = split(AttentionSpec(Heads(4, 4, 4, 8, 8), score=score, captures=CAPTURES))
    assert isinstance(found, str)
    assert reason in found


def test_cheap_and_dear_terms() -> None:
    assert operations(sp.S.Zero) == 0
    assert operations(SLOPE * k) == 1
    assert operations(SLOPE * (k - q)) < operations(SLOPE * sp.log(1 + sp.Abs(k - q)))
