"""The table in all its forms."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from attnopt.bench.measure import Result
from attnopt.bench.show import cells, head, line, markdown, plot, write_json
from attnopt.errors import OptionError

RESULT = Result("dense", "cpp", {"attnopt": 2.0}, {"sdpa": 1.25}, {"peak": 0.5, "read": 0.1}, {"sdpa": 1.5})


def test_a_row_says_what_was_found_and_asked() -> None:
    assert cells(RESULT) == ("dense", "cpp", "2.000", "1.25x", "-", "50%", "10%", "sdpa 1.5x", "no")
    assert line(cells(RESULT)).split()[0] == "dense"
    assert head().startswith("case")


def test_markdown_has_a_line_for_each_row() -> None:
    text = markdown([RESULT, RESULT], "one thread")
    assert text.startswith("one thread\n\n| case |")
    assert text.count("| dense |") == 2


def test_json_reads_back(tmp_path: Path) -> None:
    write_json([RESULT], "about", tmp_path / "x.json")
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["rows"][0]["ratios"] == {"sdpa": 1.25}
    assert data["rows"][0]["met"] is False


def test_a_picture_without_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match="needs matplotlib"):
        plot([RESULT], "about", tmp_path / "x.png")
