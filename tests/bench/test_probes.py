"""The probes run and answer in the right units."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from attnopt.bench import probes


def test_rates_are_work_over_time() -> None:
    ticks = iter((0.0, 2.0, 0.0, 4.0))
    assert probes.peak(lambda: next(ticks)) == probes.TURNS * 12 * probes.vector_lanes() * 2 / 2.0
    assert probes.read_rate(lambda: next(ticks)) == probes.BYTES / 4.0


def test_several_threads_read_all_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int]] = []
    library = SimpleNamespace(probe_read=lambda address, count: parts.append((address, count)))
    monkeypatch.setattr(probes, "_library", lambda: library)
    ticks = iter((0.0, 2.0))
    assert probes.read_rate(lambda: next(ticks), 2) == probes.BYTES / 2.0
    first, second = sorted(parts)
    assert first[0] + 4 * first[1] == second[0]
    assert first[1] + second[1] == probes.BYTES // 4
