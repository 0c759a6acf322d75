"""Masks in words: the words' own dense mask against `keep`, and the words of every kind of mask."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings

from attnopt import expr as ex
from attnopt.analysis import parts as pt
from attnopt.analysis.grid import Grid
from attnopt.analysis.masks import derive, describe
from attnopt.expr import FloorDiv, Mod, b, h, k, n_k, n_q, q
from attnopt.spec import AttentionSpec, Heads
from tests.analysis.keeps import KEEPS, START, data, grids


@settings(max_examples=400, deadline=None, derandomize=True)
@given(KEEPS, grids())
def test_the_words_are_the_mask(keep: sp.Basic, grid: Grid) -> None:
    mask = derive(ex.canon(keep))
    np.testing.assert_array_equal(mask.dense(grid), grid.dense(keep), err_msg=f"{keep} is not {mask}")
