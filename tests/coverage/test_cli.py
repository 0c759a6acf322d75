from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnopt.cli import main

pytest.importorskip("transformers")


def test_the_command_runs_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["coverage", "--only", "vit", "--variant", "eager", "--kernel", "reference", "--jobs", "1"]
    paths = [
        "--folder",
        str(tmp_path / "rows"),
        "--report",
        str(tmp_path / "a" / "c.md"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    assert main([*arguments, *paths]) == 0
    out = capsys.readouterr().out
    assert "2 sites, 2 fused, 0 declined, 0 missed" in out
    assert "| vit | eager | 2 | 2 |" in (tmp_path / "a" / "c.md").read_text()
    assert json.loads((tmp_path / "c.json").read_text())["fused"] == 2
    assert main([*arguments, *paths]) == 0, "a second run finds the rows and runs nothing"


def test_an_unknown_architecture_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--only", "no-such"]) == 2
    assert "no architecture 'no-such'" in capsys.readouterr().err
