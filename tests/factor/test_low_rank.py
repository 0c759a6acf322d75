"""Factors and lines of tables, against their definition."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from attnopt.factor.low_rank import Factors, line_of


def _table(heads: int, n_q: int, n_k: int, rank: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if not rank:
        return torch.randn(heads, n_q, n_k, generator=generator, dtype=torch.float64)
    left = torch.randn(heads, n_q, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(heads, rank, n_k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n_q", "n_k"), [(7, 7), (3, 8), (8, 3), (1, 5), (5, 1)])
def test_a_line_holds_every_distance(n_q: int, n_k: int) -> None:
    line = torch.randn(2, n_q + n_k - 1)
    places = torch.arange(n_k)[None, :] - torch.arange(n_q)[:, None] + n_q - 1
    table = line[:, places]
    found = line_of(table)
    assert found is not None
    assert torch.equal(found, line)
    if min(n_q, n_k) > 1:
        table[1, -1, -1] += 1e-6
        assert line_of(table) is None


@pytest.mark.parametrize("k_map", [(0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 1, 0), (0, 0, 0, 0)])
def test_the_full_rank_gives_the_table(k_map: tuple[int, ...]) -> None:
    table = _table(4, 5, 6)
    factors = Factors(table, k_map, centred=False)
    query, key = factors.factors(6)
    assert query.shape == (4, 5, 6)
    assert key.shape == (max(k_map) + 1, 6, 6)
    assert_close(query @ key[list(k_map)].transpose(1, 2), table, atol=1e-12, rtol=0)
    assert factors.error(6) < 1e-12


def test_the_rank_is_the_smallest_within_the_tolerance() -> None:
    factors = Factors(_table(3, 12, 10, rank=4), (0, 1, 2), centred=False)
    assert factors.rank(1e-10) == 4
    for tolerance in (0.5, 0.2, 0.05):
        rank = factors.rank(tolerance)
        assert factors.error(rank) <= tolerance < factors.error(rank - 1)
    assert [factors.error(r) for r in range(5)] == sorted((factors.error(r) for r in range(5)), reverse=True)


def test_what_cancels_in_a_softmax_costs_no_rank() -> None:
    rows = _table(2, 8, 1).expand(2, 8, 9)
    thin = _table(2, 8, 9, rank=2)
    centred = Factors(rows + thin, (0, 1), centred=True)
    query, key = centred.factors(centred.rank(1e-10))
    assert query.shape[2] <= 2
    gap = rows + thin - query @ key.transpose(1, 2)
    assert_close(gap, gap[:, :, :1].expand_as(gap), atol=1e-10, rtol=0)
    assert Factors(rows, (0, 1), centred=True).size < 1e-12


def test_a_head_of_zeros_has_no_error() -> None:
    table = _table(2, 4, 4)
    table[1] = 0
    assert Factors(table, (0, 1), centred=False).error(4) < 1e-12
