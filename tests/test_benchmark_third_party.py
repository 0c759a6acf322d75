"""The script that tries other libraries: what is not installed is named, and what a line says is measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "third_party.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    about = importlib.util.spec_from_file_location("benchmark_third_party", SCRIPT)
    assert about is not None
    assert about.loader is not None
    module = importlib.util.module_from_spec(about)
    sys.modules["benchmark_third_party"] = module
    about.loader.exec_module(module)
    return module


def test_a_line_counts_what_was_fused(script: ModuleType) -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        row = next(r for r in script.ROWS if r.model == "nn.Transformer, all masks")
        cells = [cell.strip() for cell in script.measured(row, "reference").strip("|").split("|")]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert cells[1:5] == ["`nn.Transformer, all masks`", "6", "6", ""]
    assert float(cells[5]) < 1e-5


def test_what_is_not_installed_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "version", lambda package: None)
    written = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["third_party.py", "--only", "timm", "--write", str(written)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert not end.value.code
    seen = capsys.readouterr()
    assert "skipped: timm is not installed (vit_tiny_patch16_224)" in seen.err
    assert seen.out == ""
    assert written.read_text() == script.HEAD.replace("KERNEL", "auto") + "\n"


def test_an_error_is_relative_and_counts_numbers_that_go_astray(script: ModuleType) -> None:
    x = torch.tensor([2.0, -4.0])
    assert script.error(x + torch.tensor([0.0, 1.0]), x) == 0.25
    assert script.error(torch.tensor([2.0, torch.inf]), x) == float("inf")
