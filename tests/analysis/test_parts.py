"""Masks by position: every part's dense mask against its formula, entry by entry."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import sympy as sp

from attnopt.analysis.grid import Grid
from attnopt.analysis.parts import Band, Blocks, Columns, Neighbourhood, Part, Phase, Span, keys
from attnopt.expr import b, n_k, n_q, q
from tests.analysis.keeps import START, data

_I = sp.Integer
GRID = Grid((2, 1, 7, 9), {"low": np.array([0, 2])}, {"start": 2})
_BOX = Neighbourhood((Blocks(_I(3), _I(3), back=_I(1), ahead=_I(1)), Columns(_I(3), left=_I(1), right=_I(1))))
ROWS: tuple[tuple[Part, Callable[[int, int, int], bool], str], ...] = (
    (Band(), lambda b, q, k: k <= q, "causal (top-left)"),
    (Band(n_k - n_q), lambda b, q, k: k <= q + 2, "causal (bottom-right)"),
    (
        Band(START, _I(1), _I(2)),
        lambda b, q, k: q + 1 <= k <= q + 4,
        "a window of 1 key to the left and 2 to the right",
    ),
    (Band(left=_I(0), right=None), lambda b, q, k: k >= q, "anti-causal"),
    (Band(left=_I(4), right=_I(-1)), lambda b, q, k: q - 4 <= k <= q - 1, "a diagonal band (q - 4 <= k <= q - 1)"),
    (Span(data("low", b), _I(6)), lambda b, q, k: (0, 2)[b] <= k < 6, "the keys from low[b] to 5"),
    (Span(None, 2 * q), lambda b, q, k: k < 2 * q, "a range of keys for each query (k <= 2*q - 1)"),
    (
        Blocks(_I(4), _I(2), _I(1), _I(0), _I(1), _I(0)),
        lambda b, q, k: -1 <= k // 2 - (q + 1) // 4 <= 0,
        "blocks of 2 keys at most 1 back and 0 ahead (k//2 against (q + 1)//4)",
    ),
    (Columns(_I(3), _I(2), _I(1), None), lambda b, q, k: k // 2 % 3 - q // 2 % 3 >= -1, "columns of a grid of width 3"),
    (_BOX, lambda b, q, k: abs(k // 3 - q // 3) <= 1 and abs(k % 3 - q % 3) <= 1, "a 2-D neighbourhood of 1 by 1"),
    (Phase(_I(4), _I(1), _I(2)), lambda b, q, k: (k + 1) % 4 < 2, "strided, 2 keys in 4"),
    (Phase(_I(3), relative=True), lambda b, q, k: (k - q) % 3 == 0, "dilated, 1 key in 3"),
)


@pytest.mark.parametrize(("part", "want", "words"), ROWS, ids=[r[2][:40] for r in ROWS])
def test_part(part: Part, want: Callable[[int, int, int], bool], words: str) -> None:
    dense = part.dense(GRID)
    assert dense.shape == GRID.shape
    for entry, query, key in itertools.product(range(2), range(7), range(9)):
        assert dense[entry, 0, query, key] == want(entry, query, key), (entry, query, key)
    assert str(part).startswith(words)


def test_a_causal_window_needs_brackets_inside_others() -> None:
    assert Band(left=_I(3)).compound
    assert not Band().compound


def test_one_key_is_singular() -> None:
    assert (keys(_I(1)), keys(_I(2))) == ("1 key", "2 keys")


def test_a_part_without_a_mask_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="Part"):
        Part().dense(GRID)
