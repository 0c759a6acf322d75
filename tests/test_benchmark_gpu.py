"""The GPU script takes all its steps on fake tensors, and writes what it found."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    about = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    assert about is not None
    assert about.loader is not None
    module = importlib.util.module_from_spec(about)
    sys.modules["benchmark_gpu"] = module
    about.loader.exec_module(module)
    return module


def test_a_dry_run_takes_every_step(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("dense", "bias", "documents", "gate")
    usual = script.standard
    monkeypatch.setattr(script, "standard", lambda heads: [x for x in usual(heads) if x[0] in some])
    monkeypatch.setattr(script, "ROWS", tuple(r for r in script.ROWS if r.spec in some))
    assert script.main(["--dry", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert len(report["correctness"]) == 3 * len(some) * 3 * 2
    assert all(row["ok"] and "dry" in row["note"] for row in report["table"])
    assert "| attention |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--dry"):
        script.run(False)


def test_a_row_that_fails_does_not_end_the_run(script: ModuleType) -> None:
    def fails() -> dict[str, object]:
        raise ValueError("first line\nsecond line")

    assert script.attempt(fails) == {"ok": False, "note": "ValueError: first line"}


def test_work_and_traffic(script: ModuleType) -> None:
    row = next(r for r in script.ROWS if r.name == "causal D=128")
    assert row.flops == 0.5 * 4 * 4 * 16 * 4096 * 4096 * 128
    assert row.bytes == 2 * 4 * 4 * 4096 * 16 * 128
