"""The demo itself on its smallest model, and what it does with a result that is not good."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from attnopt.cli import main
from attnopt.demo import run
from attnopt.demo.measure import Error
from attnopt.demo.run import Result

pytest.importorskip("transformers")

GOOD = Result(
    "toy", "Toy 64", "2 layers", 2, 2, 0, ("4 heads, d=16; score s/4; keep mask[b, k]",), ("cpp",), (),
    Error(1e-6, 1e-7), Error(1e-6, 1e-7), True, 0.2, 0.1, 2**20, None, 1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "good"),
    [({}, True), ({"sites": 0, "fused": 0}, False), ({"declined": 1}, False), ({"within_contract": False}, False)],
)
def test_good_means_every_site_fused_within_the_contract(changes: dict[str, object], good: bool) -> None:
    assert dataclasses.replace(GOOD, **changes).good is good


def test_the_demo_runs_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    status = main(["demo", "--quick", "--only", "vit", "--json", str(path)])
    out = capsys.readouterr().out
    (row,) = json.loads(path.read_text())
    assert status == 0, out
    assert row["fused"] == row["sites"] == 2
    assert row["good"]
    assert "12 heads, d=64; score s/8" in out
    assert "1 of 1 models good" in out


def test_a_bad_result_makes_the_exit_status_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = dataclasses.replace(
        GOOD, declined=1, fused=1, declines=("layers.0: the weights are sorted",), within_contract=False
    )
    monkeypatch.setattr(run, "run_row", lambda row, quick, say: bad)
    assert run.demo(["gpt2"]) == 1
    out = capsys.readouterr().out
    assert "declined in Toy 64: layers.0: the weights are sorted" in out
    assert "outside the contract: Toy 64" in out
