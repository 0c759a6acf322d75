"""The demo's table: figures, missing figures, and expressions with square brackets."""

from __future__ import annotations

import pytest

from attnopt.demo.table import Screen
from tests.demo.test_run import GOOD


def test_the_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(1) as screen:
        screen.step_of("Toy")("building")
        screen.done(GOOD)
    screen.table([GOOD], 12.3)
    out = capsys.readouterr().out
    for text in (
        "Toy 64",
        "mask[b, k]",
        "kernel cpp",
        "1.0e-06",
        "1.0e-07",
        "200",
        "100",
        "2.00x",
        "1 of 1 models good; 12 s",
    ):
        assert text in out, text
    assert any(line.count("-") and "declined" not in line for line in out.splitlines()), "unknown memory is a dash"
