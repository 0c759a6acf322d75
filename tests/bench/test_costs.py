"""What calls cost is measured where it should be, and compared with what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnopt.bench import costs
from attnopt.bench.costs import COSTS, Cost, cost, extra_memory, first_calls, per_call


def test_a_cost_is_met_up_to_its_limit() -> None:
    assert Cost("x", 3.0, 3, "s").met
    assert not Cost("x", 3.1, 3, "s").met
    assert not Cost("x", math.nan, 3, "s").met


def test_a_row_is_measured_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "every call beside its attention", (30, "µs", lambda quick: 7.0 + quick))
    before = torch.get_num_threads()
    assert cost("every call beside its attention", 1, True) == Cost("every call beside its attention", 8.0, 30, "µs")
    torch.set_num_threads(before)


def test_the_second_first_call_finds_the_kernel_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = costs._first_call

    def spy(case: costs.Case, folder: Path) -> float:
        seen.append(len(list(folder.rglob("*.so"))))
        return real(case, folder)

    monkeypatch.setattr(costs, "_first_call", spy)
    first, second = first_calls(1)
    assert seen == [0, 1]
    assert min(first, second) > 0


def test_a_call_takes_time() -> None:
    assert per_call(2) >= 0


def test_memory_is_that_of_one_call_and_nan_where_nobody_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(call: Callable[[], tuple[Tensor, Tensor]]) -> int:
        seen.append(call()[0].shape[2])
        return 15

    monkeypatch.setattr(costs, "peak_memory", counted)
    assert extra_memory(256) == 15.0
    assert seen == [256]
    monkeypatch.setattr(costs, "peak_memory", lambda call: None)
    assert math.isnan(extra_memory(256))
