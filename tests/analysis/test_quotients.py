"""Quotients and remainders in lowest terms, against integer arithmetic."""

from __future__ import annotations

import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.analysis.quotients import digits, quotient, tidy
from attnopt.expr import FloorDiv, Mod, k, n_k, q

_NUMBER = st.integers(-9, 9)


@st.composite
def _expressions(draw: st.DrawFn) -> sp.Expr:
    x = draw(_NUMBER) * k + draw(_NUMBER) * q + draw(_NUMBER)
    inner = draw(st.sampled_from([FloorDiv, Mod]))(x, draw(st.integers(1, 6)))
    outer = draw(st.sampled_from([FloorDiv, Mod]))(inner * draw(_NUMBER) + x, draw(st.integers(1, 6)))
    return outer + draw(_NUMBER) * inner + draw(st.integers(-2, 2)) * x


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_expressions(), st.integers(0, 40), st.integers(0, 40))
def test_values_stay(e: sp.Expr, key: int, query: int) -> None:
    at = {k: sp.Integer(key), q: sp.Integer(query)}
    want = e.xreplace(at)
    assert tidy(sp.expand(e)).xreplace(at) == want
    assert digits(sp.expand(e)).xreplace(at) == want


MEETING = (
    (FloorDiv(k + 8, 4), FloorDiv(k, 4) + 2),
    (FloorDiv(4 * q + k, 4), q + FloorDiv(k, 4)),
    (FloorDiv(2 * k + 1, 4), FloorDiv(k, 2)),
    (FloorDiv(FloorDiv(k, 2), 3), FloorDiv(k, 6)),
    (Mod(k + 17, 8), Mod(k + 1, 8)),
    (Mod(k - 9 * q, 8), Mod(k - q, 8)),
    (Mod(Mod(k, 16) + q, 4), Mod(k + q, 4)),
    (FloorDiv(k - n_k, 4), FloorDiv(k - n_k, 4)),
)


@pytest.mark.parametrize(("given_as", "want"), MEETING, ids=[str(m[0]) for m in MEETING])
def test_lowest_terms(given_as: sp.Expr, want: sp.Expr) -> None:
    assert tidy(given_as) == want


def test_digits_join_what_was_taken_apart() -> None:
    assert digits(k - 4 * FloorDiv(k, 4) - q) == Mod(k, 4) - q
    assert digits(k - Mod(k, 4) - q + Mod(q, 4)) == 4 * FloorDiv(k, 4) - 4 * FloorDiv(q, 4)
    assert digits(k - 3 * FloorDiv(k, 4)) == k - 3 * FloorDiv(k, 4)


def test_a_number_is_divided() -> None:
    assert quotient(sp.Integer(-7), sp.Integer(2)) == -4
