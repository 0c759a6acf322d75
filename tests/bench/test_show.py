"""The table in all its forms."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from attnopt.bench.costs import Cost
from attnopt.bench.measure import Result
from attnopt.bench.show import cells, cost_cells, cost_head, head, line, markdown, plot, write_json
from attnopt.errors import OptionError

RESULT = Result("dense", "cpp", {"attnopt": 2.0}, {"sdpa": 1.25}, {"peak": 0.5, "read": 0.1}, {"sdpa": 1.5})


def test_a_row_says_what_was_found_and_asked() -> None:
    shown = ("dense", "cpp", "2.000", "1.25x", "-", "-", "50%", "-", "10%", "sdpa 1.5x", "no")
    assert cells(RESULT) == shown
    assert line(shown).split()[0] == "dense"
    assert head().startswith("case")


def test_a_ratio_above_the_peak_is_said_to_be_one() -> None:
    shares = {"peak": 0.8, "read": 0.0, "flex peak": 0.4}
    row = Result("x", "cpp", {"attnopt": 1.0}, {"flex": 2.0}, shares, {"flex": 3.0})
    assert cells(row)[-1] == "no: 2.50x is the peak"
    assert cells(Result("x", "cpp", row.times, row.ratios, shares, {"flex": 2.4}))[-1] == "no"


def test_a_cost_says_what_it_may_be() -> None:
    shown = cost_cells(Cost("first call", 0.1234, 3, "s"))
    assert shown == ("first call", "0.123 s", "3 s", "yes")
    assert line(shown).startswith("first call  ")
    assert cost_head().startswith("cost")


def test_markdown_has_a_line_for_each_row() -> None:
    text = markdown([RESULT, RESULT], "one thread")
    assert text.startswith("one thread\n\n| case |")
    assert text.count("| dense |") == 2
    both = markdown([RESULT], "one thread", [Cost("memory", 1, 2, "MB")])
    assert both.index("| dense |") < both.index("| memory | 1 MB | 2 MB | yes |")
    assert "| case |" not in markdown([], "one thread", [Cost("memory", 1, 2, "MB")])


def test_json_reads_back(tmp_path: Path) -> None:
    write_json([RESULT], "about", tmp_path / "x.json", [Cost("memory", 3, 2, "MB")])
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["rows"][0]["ratios"] == {"sdpa": 1.25}
    assert data["rows"][0]["met"] is False
    assert data["costs"] == [{"name": "memory", "value": 3, "limit": 2, "unit": "MB", "met": False}]


def test_a_picture_without_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="needs matplotlib"):
        plot([RESULT], "about", tmp_path / "x.png")
