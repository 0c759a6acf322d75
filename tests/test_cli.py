"""The `attnopt` command: what each part prints, and what misuse gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt import __version__
from attnopt.cli import main

MODELS = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) / 4, dim=-1) @ v

class Plain(nn.Module):
    def forward(self, x):
        return x * 2

class Odd(nn.Module):
    # One attention, one whose scores are summed up along the keys, and a router.

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, q, k, v):
        scores = (q @ k.mT).cumsum(-1)
        return self.inner(q, k, v) + scores.softmax(-1) @ v, q.softmax(-1).topk(2).values

x = torch.zeros(1, 2, 8, 16)
def odd():
    return Odd(), (x, x, x)
def build():
    return Attention(), (x, x, x), {}
def plain():
    return Plain(), (x,)
def half():
    return Plain()
def wrong():
    return Plain(), x
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(path))
    return path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return "cli_models"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"attnopt {__version__}\n"


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "attnopt", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"attnopt {__version__}\n")


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["cache"], ["cache", "eat"], ["explain", "hf:gpt2", "--layers", "0"]]
)
def test_misuse_exits_with_two_and_says_how(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: attnopt" in capsys.readouterr().err


def test_info_names_versions_compiler_and_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for label in ("attnopt", "torch", "compiler", "processor", "cache", "options"):
        assert any(line.startswith(label) for line in out.splitlines()), label
    assert str(cache) in out


def test_info_survives_the_lack_of_a_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTNOPT_CXX", "no-such-compiler")
    assert main(["info"]) == 0
    assert "none: " in capsys.readouterr().out


def test_explain_prints_the_report_and_writes_files(
    models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    assert main(["explain", f"{models}:build", "--json", str(paths["json"]), "--html", str(paths["html"])]) == 0
    assert "1 site: 1 fused, 0 rewritten, 0 declined" in capsys.readouterr().out
    assert json.loads(paths["json"].read_text())["counts"]["fused"] == 1
    assert "<html" in paths["html"].read_text()


def test_explain_says_what_how_and_where(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{models}:odd"]) == 0
    out = capsys.readouterr().out
    for said in (
        "out[b, h, q] = sum of softmax(s/4) * V[b, h, k] over k, with s = Q[b, h, q]·K[b, h, k]",
        "mask: every query attends to every key",
        "found by softmax",
        "inner (",
        "cli_models.py:7)",
        "no contraction of queries and keys makes the scores",
        "stopped at %cumsum = aten::cumsum [1, 2, 8, 8] float32 (",
        "to lift it: ",
        "1 softmax is no attention (attnopt explain --all lists them)",
    ):
        assert said in out, said
    assert "its result goes to topk" not in out
    assert main(["explain", f"{models}:odd", "--all"]) == 0
    assert "its result goes to topk (" in capsys.readouterr().out


def test_explain_strict_says_no_for_a_model_without_attention(models: str) -> None:
    assert main(["explain", f"{models}:plain"]) == 0
    assert main(["explain", f"{models}:plain", "--strict"]) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "neither MODULE:NAME nor hf:MODEL_TYPE"),
        ("no_such_module_here:build", "cannot import"),
        ("cli_models:absent", "has no 'absent'"),
        ("cli_models:half", "gave a Plain without inputs"),
        ("cli_models:wrong", "it gave Tensor and dict"),
        ("hf:no-such-type", "knows no model type"),
    ],
)
def test_explain_says_what_is_wrong_with_its_target(
    models: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", target]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_found_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "nothing", "--json", "/no/such/folder/report.json"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_explain_by_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["explain", "hf:gpt2", "--layers", "1", "--tokens", "16", "--strict"]) == 0
    assert "1 site: 1 fused" in capsys.readouterr().out


def test_an_empty_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == main(["cache", "verify"]) == main(["cache", "clear"]) == 0
    assert main(["cache", "export", str(tmp_path / "kernels.tar.gz")]) == 0
    out = capsys.readouterr().out
    assert "0 kernels, 0.0 MiB" in out
    assert "0 good, 0 bad" in out
    assert "0 kernels removed" in out
    assert "0 kernels written" in out


def test_a_bad_entry_is_shown_and_cleared(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir(mode=0o700)
    (cache / f"{'a' * 64}.json").write_text("{}")
    assert main(["cache", "verify"]) == 1
    assert "aaaaaaaaaaaaaaaa  " in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert main(["cache", "verify"]) == 0


def test_a_hostile_cache_folder_is_one_clear_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert main(["cache", "ls"]) == 2
    assert "can be written by others" in capsys.readouterr().err


def test_an_unknown_demo_model_is_an_error_that_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--only", "nonesuch"]) == 2
    assert "minilm, gpt2, llama" in capsys.readouterr().err


def test_an_invalid_environment_variable_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTNOPT_FUEL", "plenty")
    assert main(["info"]) == 2
    assert "ATTNOPT_FUEL='plenty'" in capsys.readouterr().err
