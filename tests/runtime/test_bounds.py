"""Loads that leave their tensor are found before a kernel makes them."""

from __future__ import annotations

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.runtime.bounds import by_data, outside
from attnopt.spec import AttentionSpec, Capture, Heads
from tests.runtime.cases import inputs

LINE = (Capture("line", "float", (None,)),)


def spec(index: sp.Expr, guard: object = None) -> AttentionSpec:
    load = ex.load("line", index)
    score = ex.s + (load if guard is None else ex.Where(guard, load, sp.S.Zero))
    return AttentionSpec(Heads(2, 2, 2, 4, 4), score=score, captures=LINE)


def found(item: AttentionSpec, length: int) -> str | None:
    q, k, _ = inputs(item, 1, 5, 7)
    return outside(item, q, k, [torch.zeros(length)], [])


def test_affine_indices_are_exact() -> None:
    item = spec(ex.q - ex.k + ex.n_k - 1)
    assert found(item, 11) is None
    assert "reads line at 0..10 along dimension 0 of size 10" in str(found(item, 10))
    assert "at -6..4" in str(found(spec(ex.q - ex.k), 50))


def test_a_guard_counts() -> None:
    assert found(spec(ex.q - ex.k, sp.Ge(ex.q - ex.k, 0)), 5) is None
    assert found(spec(ex.q - ex.k, sp.Ge(ex.q - ex.k, 0)), 4) is not None
    assert found(spec(ex.k - ex.q, sp.Ge(ex.k - ex.n_k, 0)), 1) is None


def test_indices_from_data_are_checked_on_the_data() -> None:
    captures = (*LINE, Capture("place", "int", (None,)))
    index = ex.load("place", ex.k, integer=True)
    item = AttentionSpec(Heads(2, 2, 2, 4, 4), score=ex.s + ex.load("line", index), captures=captures)
    q, k, _ = inputs(item, 1, 5, 7)
    line, place = torch.zeros(4), torch.tensor([0, 1, 2, 3, 3, 3, 0])
    assert by_data(item)
    assert not by_data(spec(ex.q))
    assert outside(item, q, k, [line, place], [], data_only=True) is None
    assert "size 4" in str(outside(item, q, k, [line, place + 1], [], data_only=True))
