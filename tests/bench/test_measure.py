"""One row from inputs to verdict."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from attnopt.bench import cases, rivals
from attnopt.bench import measure as measured
from attnopt.bench.cases import Case
from attnopt.bench.measure import Result, clock_of, measure
from attnopt.expr import k, q
from tests.specs import case


def test_one_thread_is_timed_by_what_it_computed() -> None:
    assert clock_of(1) is time.thread_time
    assert clock_of(2) is time.perf_counter


def test_a_row_has_times_ratios_and_shares() -> None:
    before = torch.get_num_threads()
    for backward in (False, True):
        result = measure(Case("small", case("scale").spec, 1, 8, 8, backward=backward), 1, 1, False)
        assert set(result.times) == {"attnopt", "sdpa"}
        assert set(result.ratios) == {"sdpa"}
        assert set(result.shares) == {"peak", "read"}
        assert result.kernel
        assert min(result.times.values()) >= 0
    torch.set_num_threads(before)


def test_a_rival_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> Any:
        def call(*_: object) -> Any:
            raise RuntimeError("no such kernel\nand much more")

        return call

    monkeypatch.setattr(rivals, "sdpa", broken)
    before = torch.get_num_threads()
    result = measure(Case("small", case("scale").spec, 1, 8, 8), 1, 1, False)
    torch.set_num_threads(before)
    assert set(result.times) == {"attnopt"}
    assert not result.ratios
    assert "small: sdpa cannot run it (no such kernel) and is left out." in caplog.text


def test_the_own_kernel_is_compared_by_kept_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(float(x) for x in range(1000))
    monkeypatch.setattr(measured, "clock_of", lambda threads: lambda: next(ticks))
    plain = case("scale").spec
    targets = {"own": 0.3, "flex": 3.0}
    monkeypatch.setattr(cases, "TILE", 2)
    row = Case("small", replace(plain, keep=k <= q), 1, 8, 8, beside=plain, targets=targets)
    before = torch.get_num_threads()
    result = measure(row, 1, 1, False)
    torch.set_num_threads(before)
    assert set(result.times) == {"attnopt", "sdpa", "own"}
    assert result.ratios["own"] == 10 / 16  # every run takes one tick
    assert result.targets == {"own": 0.3}  # FlexAttention was not asked for
    assert result.met
    assert targets == {"own": 0.3, "flex": 3.0}


def test_short_calls_are_repeated_by_the_shortest_of_a_few() -> None:
    taken = iter((1e-3, 1e-4, 2e-4, 1e-4, 1e-4))
    assert measured._repeats(lambda: next(taken)) == 30
    assert next(taken, None) is None
    long = iter((0.5,))
    assert measured._repeats(lambda: next(long)) == 1


def test_the_peak_bounds_the_ratio() -> None:
    assert Result("x", "cpp", {}, {}, {"flex peak": 0.25}).bound == 4
    assert Result("x", "cpp", {}, {}, {}).bound == math.inf


def test_targets_are_least_values() -> None:
    result = Result("x", "cpp", {"attnopt": 1.0}, {"sdpa": 1.2}, {"peak": 0.8}, {"sdpa": 1.2, "peak": 0.8})
    assert result.met
    assert not Result("x", "cpp", {}, {"sdpa": 1.1}, {}, {"sdpa": 1.2}).met
    assert not Result("x", "cpp", {}, {}, {}, {"sdpa": 1.2}).met
