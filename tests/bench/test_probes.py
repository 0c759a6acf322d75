"""The probes run and answer in the right units."""

from __future__ import annotations

from attnopt.bench import probes


def test_rates_are_work_over_time() -> None:
    ticks = iter((0.0, 2.0, 0.0, 4.0))
    assert probes.peak(lambda: next(ticks)) == probes.TURNS * 12 * probes.vector_lanes() * 2 / 2.0
    assert probes.read_rate(lambda: next(ticks)) == probes.BYTES / 4.0
