"""The estimate of what a bias costs."""

from __future__ import annotations

import torch

from attnopt.factor.cost import estimate


def _operands(n: int, heads: int = 8, keys: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, heads, n, 64), torch.empty(1, keys, n, 64)


def test_a_small_rank_pays_where_the_table_is_read_from_memory() -> None:
    assert estimate(*_operands(1024), 6, True, 1).pays
    assert not estimate(*_operands(1024), 32, True, 1).pays
    assert not estimate(*_operands(49), 2, True, 1).pays, "a table in the cache, and columns to join for few scores"


def test_a_closed_form_of_few_operations_stays() -> None:
    guess = estimate(*_operands(1024), 1, False, 1)
    assert not guess.pays
    assert "1 further dimensions would cost" in str(guess)
    assert estimate(*_operands(4096), 2, False, 17).pays


def test_a_gpu_reads_tables_slowly() -> None:
    wide = [t.to("meta") for t in _operands(1024)]
    assert estimate(*wide, 32, True, 1).pays
    assert not estimate(*wide, 80, True, 1).pays


def test_shared_keys_are_joined_once() -> None:
    alone, shared = estimate(*_operands(256), 4, True, 1), estimate(*_operands(256, keys=1), 4, True, 1)
    assert shared.then < alone.then
