"""The command from names to files."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.bench import run
from attnopt.bench.costs import Cost
from attnopt.bench.measure import Result
from attnopt.cli import main

RESULT = Result("dense D=64", "cpp", {"attnopt": 2.0}, {"sdpa": 1.25}, {"peak": 0.5, "read": 0.1}, {"sdpa": 1.0})


def test_an_unknown_row_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cpu", "--only", "nothing"]) == 2
    assert "no row is called nothing" in capsys.readouterr().err


def test_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "measure", lambda *args: RESULT)
    paths = [tmp_path / "x.json", tmp_path / "x.md"]
    arguments = ["bench", "cpu", "--only", "dense D=64", "--json", str(paths[0]), "--markdown", str(paths[1])]
    assert main(arguments) == 0
    assert "1.25x" in capsys.readouterr().out
    assert all("dense D=64" in path.read_text() for path in paths)


def test_costs_have_a_table_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "cost", lambda name, threads, quick: Cost(name, 501.0, 500, "MB"))
    assert run.bench(["memory"]) == 1
    out = capsys.readouterr().out
    assert "memory for 32,768 tokens" in out
    assert "501 MB" in out
    assert "vs SDPA" not in out


def test_a_missed_target_is_exit_status_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = Result("x", "cpp", {"attnopt": 1.0}, {}, {"peak": 0.1, "read": 0.1}, {"peak": 0.5})
    monkeypatch.setattr(run, "measure", lambda *args: missed)
    assert run.bench(["dense D=64"]) == 1
