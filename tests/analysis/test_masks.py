"""Masks in words: the words' own dense mask against `keep`, and the words of every kind of mask."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.analysis.joins import All, Row
from attnopt.analysis.masks import derive, describe
from attnopt.analysis.parts import Band
from attnopt.expr import FloorDiv, Mod, b, h, k, n_k, n_q, q
from attnopt.spec import AttentionSpec, Heads
from tests.analysis.keeps import KEEPS, START, data, grids


@settings(max_examples=200, deadline=None, derandomize=True)
@given(KEEPS, grids())
def test_the_words_are_the_mask(keep: sp.Basic, grid: Grid) -> None:
    mask = derive(ex.canon(keep))
    np.testing.assert_array_equal(mask.dense(grid), grid.dense(keep), err_msg=f"{keep} is not {mask}")


_CAUSAL, _MASK = k <= q, sp.Ne(data("mask", b, k), 0)
_LENGTH, _LOW, _IDS = data("lengths", b), data("low", b), (data("ids", b, q), data("ids", b, k))
_ROWS, _COLUMNS = sp.Abs(FloorDiv(k, 8) - FloorDiv(q, 8)), sp.Abs(Mod(k, 8) - Mod(q, 8))
_CUBE = sp.Abs(FloorDiv(k, 64) - FloorDiv(q, 64)), sp.Abs(Mod(FloorDiv(k, 8), 8) - Mod(FloorDiv(q, 8), 8))
WORDS = (
    (sp.true, "all keys"),
    (sp.false, "no key"),
    (_CAUSAL, "causal (top-left)"),
    (k <= q + n_k - n_q, "causal (bottom-right)"),
    (k <= q + START, "causal (k <= q + start)"),
    (k <= q + 17, "causal (k <= q + 17)"),
    (k < q, "strictly causal (k < q)"),
    (k >= q, "anti-causal (top-left)"),
    (k > q + 2, "anti-causal (k >= q + 3)"),
    (sp.Eq(k, q), "the query's own position only (top-left)"),
    (sp.Ne(k, q), "every position but the query's own"),
    (
        sp.And(_CAUSAL, k > q - 513, _MASK),
        "causal (top-left), and within a window of 512 keys to the left, and not padding (mask[b, k])",
    ),
    (
        sp.And(k <= q + START, k > q + START - 128),
        "causal (k <= q + start), and within a window of 127 keys to the left",
    ),
    (sp.And(_CAUSAL, k > q - data("w", h)), "causal (top-left), and within a window of w[h] - 1 keys to the left"),
    (sp.Abs(q - k) <= 3, "a window of 3 keys to the left and 3 to the right (top-left)"),
    (sp.And(k >= q - 1, k < q + 5), "a window of 1 key to the left and 4 to the right (top-left)"),
    (sp.And(k <= q - 3, k > q - 8), "a diagonal band (q - 7 <= k <= q - 3)"),
    (q - k < 512, "at most 511 keys to the left of the diagonal (top-left)"),
    (sp.Eq(FloorDiv(k, 4), FloorDiv(q, 4)), "the same block of 4 keys (k//4 == q//4)"),
    (
        sp.And(_CAUSAL, sp.Eq(FloorDiv(k, 4), FloorDiv(q, 4))),
        "chunked causal: causal (top-left), and the same block of 4 keys (k//4 == q//4)",
    ),
    (FloorDiv(k, 4) <= FloorDiv(q, 4), "block-causal, no later block of 4 keys (k//4 <= q//4)"),
    (FloorDiv(k, 16) < FloorDiv(q, 16), "earlier blocks of 16 keys only (k//16 < q//16)"),
    (
        sp.Abs(FloorDiv(k, 16) - FloorDiv(q, 16)) <= 1,
        "blocks of 16 keys at most 1 back and 1 ahead (k//16 against q//16)",
    ),
    (k <= FloorDiv(q, 2), "causal by position (k <= q//2)"),
    (k <= data("pos", q), "causal by position (k <= pos[q])"),
    (k < 5, "the first 5 keys"),
    (k >= n_k - 5, "the last 5 keys"),
    (sp.And(k >= 3, k < 7), "the keys from 3 to 6"),
    (k < START, "the first start keys"),
    (k < _LENGTH, "not padding (the first lengths[b] keys)"),
    (k >= n_k - _LENGTH, "not padding (the last lengths[b] keys)"),
    (k >= _LOW, "not padding (the keys from low[b] on)"),
    (sp.Eq(data("mask", b, k), 0), "not padding (not mask[b, k])"),
    (ex.load("mask", b, k) > sp.Rational(1, 2), "not padding (1/2 < mask[b, k])"),
    (sp.Ne(data("mask", h, k), 0), "keys by data (mask[h, k])"),
    (sp.Eq(*_IDS), "the same document (ids[b, q] == ids[b, k])"),
    (sp.And(_CAUSAL, sp.Eq(*_IDS)), "causal (top-left), and the same document (ids[b, q] == ids[b, k])"),
    (_IDS[1] <= _IDS[0], "ordered by data (ids[b, k] <= ids[b, q])"),
    (sp.Or(_CAUSAL, k < 5), "prefix-LM: causal (top-left), or the first 5 keys"),
    (k <= ex.Maximum(q, 4), "prefix-LM: causal (top-left), or the first 5 keys"),
    (sp.Or(_CAUSAL, k < data("prefix", b)), "prefix-LM: causal (top-left), or the first prefix[b] keys"),
    (sp.Eq(Mod(q - k, 2), 0), "dilated, 1 key in 2 ((k - q) % 2 == 0)"),
    (sp.Eq(Mod(k, 4), 3), "strided, 1 key in 4 ((k + 1) % 4 == 0)"),
    (Mod(k, 8) >= 6, "strided, 2 keys in 8 ((k + 2) % 8 < 2)"),
    (sp.And(_ROWS <= 1, _COLUMNS <= 2), "a 2-D neighbourhood of 1 by 2 on a grid of rows of 8"),
    (sp.And(*(a <= 1 for a in _CUBE), _COLUMNS <= 1), "a 3-D neighbourhood of 1 by 1 by 1 on a grid of rows of 8 by 8"),
    (_COLUMNS <= 2, "columns of a grid of width 8 at most 2 left and 2 right (k % 8)"),
    (sp.Ne(data("m", b, q, k), 0), "arbitrary data (m[b, q, k])"),
    (sp.And(_CAUSAL, sp.Ne(data("m", b, q), 0)), "causal (top-left), and only for queries with m[b, q]"),
    (h < 2, "only for rows with h <= 1"),
    (q * k <= 8, "arbitrary: k*q <= 8"),
    (k >= ex.Minimum(ex.Maximum(q - 3, 0), n_k - 7), "a range of keys for each query (minimum(maximum(q - 3, 0), n_k - 7) <= k)"),
    (
        sp.Abs(k - ex.Minimum(ex.Maximum(q, 3), n_k - 4)) <= 3,
        "a range of keys for each query (minimum(maximum(q, 3), n_k - 4) - 3 <= k <= maximum(q, 3) + 3)",
    ),
    (
        sp.And(_CAUSAL, sp.Or(k < 4, q - k < 512)),
        "causal (top-left), and (at most 511 keys to the left of the diagonal (top-left), or the first 4 keys)",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("keep", "words"), WORDS, ids=[w[1][:60] for w in WORDS])
def test_words(keep: sp.Basic, words: str) -> None:
    assert str(derive(ex.canon(keep))) == words


MEETING = (
    (k <= q, q >= k, sp.Not(k > q), sp.Eq(ex.Where(k > q, 1, 0), 0), 2 * k <= 2 * q + 1, sp.Eq(ex.Maximum(k, q), q)),
    (
        sp.Eq(FloorDiv(k, 4), FloorDiv(q, 4)), sp.Eq(k - Mod(k, 4), q - Mod(q, 4)),
        sp.And(k >= 4 * FloorDiv(q, 4), k < 4 * FloorDiv(q, 4) + 4), sp.Eq(FloorDiv(k + 8, 4), FloorDiv(q, 4) + 2),
        sp.Eq(FloorDiv(FloorDiv(k, 2), 2), FloorDiv(2 * q, 8)),
    ),
    (
        sp.And(k <= q, k > q - 8), sp.Eq(FloorDiv(q - k, 8), 0), sp.And(q - k < 8, q - k >= 0, k <= q + 3),
        sp.And(sp.Abs(q - k) <= 7, k <= q), ex.Minimum(q - k, k - q + 7) >= 0,
    ),
    (k < _LENGTH, sp.Not(k >= _LENGTH), _LENGTH - k > 0),
    (sp.Eq(Mod(q - k, 4), 0), sp.Eq(Mod(k, 4), Mod(q, 4)), sp.Eq(Mod(k + 4 - q, 4), 0), Mod(k - q, 4) < 1),
    (sp.Or(k <= q, k < 5), k <= ex.Maximum(q, 4), sp.Not(sp.And(k > q, k > 4)), k < ex.Maximum(q + 1, 5)),
)  # fmt: skip


@pytest.mark.parametrize("spellings", MEETING, ids=[str(m[0])[:40] for m in MEETING])
def test_spellings_meet(spellings: tuple[sp.Basic, ...]) -> None:
    assert len({derive(ex.canon(s)) for s in spellings}) == 1, [str(derive(ex.canon(s))) for s in spellings]


def test_parts_are_data() -> None:
    mask = derive(ex.canon(sp.And(_CAUSAL, k > q - 8, _MASK)))
    assert mask.parts == (Band(left=sp.Integer(7)), Row(_MASK))
    assert mask.part == All(mask.parts)
    assert hash(mask) == hash(derive(ex.canon(sp.And(_MASK, q - k < 8, q >= k))))


def test_a_mask_that_is_almost_causal_is_not_called_so() -> None:
    for keep in (sp.Or(_CAUSAL, sp.Eq(k, 3)), k <= 2 * q, sp.And(_CAUSAL, sp.Ne(k, 0)), k <= q + h):
        assert str(derive(ex.canon(keep))) not in ("causal (top-left)", "causal (bottom-right)")


def test_a_sum_of_attentions_says_each_mask_once() -> None:
    one = AttentionSpec(Heads(1, 1, 1, 8, 8), keep=_CAUSAL)
    assert describe(one) == "causal (top-left)"
    both = AttentionSpec(Heads(1, 1, 1, 8, 8), keep=_CAUSAL, merge=(AttentionSpec(Heads(1, 1, 1, 8, 8)), one))
    assert describe(both) == "causal (top-left); and all keys"


FILLS = (
    (ex.s + ex.Where(_MASK, 0, -10000), sp.true, "not padding (mask[b, k]), as -10000 in the score"),
    (ex.Where(k > q, ex.Snap(ex.s, 32) - 65504, ex.s), sp.true, "causal (top-left), as -65504 in the score"),
    (
        ex.s + ex.Where(_MASK, 0, -10000),
        _CAUSAL,
        "causal (top-left); and not padding (mask[b, k]), as -10000 in the score",
    ),
    (ex.s + ex.Where(_MASK, 0, -3), sp.true, "all keys"),
    (ex.s + ex.load("bias", q, k), sp.true, "all keys"),
    (ex.Where(_CAUSAL, ex.s, ex.NEG_INF), sp.true, "all keys"),
)


@pytest.mark.parametrize(("score", "keep", "words"), FILLS, ids=[str(f[0]) for f in FILLS])
def test_a_finite_fill_in_the_score_is_told_apart(score: sp.Expr, keep: sp.Basic, words: str) -> None:
    assert describe(AttentionSpec(Heads(1, 1, 1, 8, 8), score=score, keep=keep)) == words
