"""`attnopt aot`: a folder with binaries and a manifest, or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attnopt.cli import main
from attnopt.runtime.triton_binaries import read
from attnopt.spec import Heads
from tests.specs import case, with_heads


def test_a_spec_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = with_heads(case("causal"), Heads(4, 2, 2, 32, 32)).spec
    (tmp_path / "mine.json").write_text(spec.text)
    out = tmp_path / "out"
    assert main(["aot", "--arch", "sm_90", "--out", str(out), "--spec", str(tmp_path / "mine.json")]) == 0
    assert "1 kernels" in capsys.readouterr().out
    (found,) = read(out)
    assert found.kernel.spec_key == spec.key
    assert json.loads((out / "manifest.json").read_text())["kernels"][0]["name"] == "mine"
    given = ["--arch", "sm_80", "--out", str(out), "--spec", str(tmp_path / "mine.json"), "--kind", "decode"]
    assert main(["aot", *given, "--page", "16"]) == 0
    assert [(x.kernel.kind, x.kernel.layout.page) for x in read(out)] == [("decode", 16)] * 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--only", "nothing"], "no usual spec"),
        (["--page", "-3"], "a page holds at least one key"),
        (["--spec", "/nowhere/x.json"], "cannot be read"),
    ],
)
def test_misuse_is_said(more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aot", "--arch", "sm_90", "--out", str(tmp_path), *more]) == 2
    assert reason in capsys.readouterr().err


def test_a_spec_file_is_parsed_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("__import__('os')")
    assert main(["aot", "--arch", "sm_90", "--out", str(tmp_path), "--spec", str(tmp_path / "bad.json")]) == 2
    assert "malformed" in capsys.readouterr().err
