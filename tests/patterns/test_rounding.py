"""Arithmetic that rounds or overflows is not read as if it were exact."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.patterns.rounding import out_of_range, overflows, rounds

MASK = ex.load("mask", ex.b, ex.k, integer=True)
MIN = ex.number(torch.finfo(torch.float32).min)
KEPT = ex.Where(sp.Ne(MASK, 0), sp.S.Zero, MIN)


def test_a_constant_beyond_the_dtype_overflows() -> None:
    assert overflows(ex.k * MIN, torch.bfloat16)
    assert not overflows(ex.k * MIN, torch.float32)
    assert not overflows(ex.k * MIN, torch.int64)


@pytest.mark.parametrize(
    ("found", "expected"),
    [(MIN * (1 - MASK), True), (MASK * MIN * ex.k, True), (10000 * MASK, False), (KEPT, False), (MIN * ex.k, False)],
)
def test_a_tensor_times_a_huge_number_is_out_of_range(found: sp.Expr, expected: bool) -> None:
    assert out_of_range(found) is expected


@pytest.mark.parametrize(
    ("found", "dtype", "expected"),
    [
        (ex.k, torch.bfloat16, True),
        (ex.k, torch.float32, False),
        (ex.k / 4, torch.float32, False),
        (ex.k * ex.number(0.7), torch.float32, True),
        (ex.k * ex.number(0.7), torch.float64, True),
        (ex.load("x", ex.k), torch.bfloat16, False),
        (ex.load("x", ex.k) + ex.load("y", ex.q), torch.float32, True),
        (MASK - ex.load("ids", ex.q, integer=True), torch.float32, False),
        (KEPT, torch.bfloat16, False),
        (ex.k, torch.int64, False),
    ],
)
def test_positions_that_the_dtype_rounds(found: sp.Expr, dtype: torch.dtype, expected: bool) -> None:
    assert rounds(found, dtype) is expected
