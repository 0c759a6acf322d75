"""`attnopt export`: a file and a report, or one clear error and no file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from attnopt.cli import main
from attnopt.errors import OptionError
from attnopt.export import dynamic
from tests.onnx.conftest import one_registry  # noqa: F401  (read once, as by the other exports)

MODELS = """
import torch
from torch import nn

class Causal(nn.Module):
    def forward(self, x, mask=None):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out.transpose(1, 2).flatten(2)

class Odd(nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return torch.sigmoid(q @ q.mT) @ q

x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
def causal():
    return Causal().train(), (x,)
def odd():
    return Odd(), (x,), {}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder beside one with the models, which is the current one."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "export_models.py").write_text(MODELS)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "export_models", raising=False)
    return tmp_path / "out"


def test_a_model_is_written_and_its_report_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    wanted = ["--target", "ort", "--opset", "23", "--dynamic", "x:0=batch,1=tokens", "--json", str(folder / "r.json")]
    assert main(["export", "export_models:causal", "--out", str(folder / "m.onnx"), *wanted]) == 0
    out = capsys.readouterr().out
    for said in ("1 site: 1 fused", "com.microsoft.GroupQueryAttention", "validation at other sizes", "written: "):
        assert said in out, said
    graph = onnx.load(folder / "m.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", "tokens", 16]
    assert json.loads((folder / "r.json").read_text())["figures"]["onnx"]["target"] == "ort"


def test_strict_says_no_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed)
    assert main(["export", "export_models:odd", "--out", str(folder / "m.onnx"), "--strict", "--no-validate"]) == 1
    assert "1 of 1 sites are no operator" in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("export_models:causal", ["--target", "tensorrt"], "target='tensorrt' is unknown; choose one of onnx, ort"),
        ("export_models:causal", ["--opset", "17"], "opset=17 is not supported"),
        ("export_models:causal", ["--json", "/no/such/folder/r.json"], "the folder '/no/such/folder' does not exist"),
        ("export_models:causal", ["--dynamic", "x=0"], "'x=0' is not INPUT:DIM=NAME"),
        ("export_models:causal", ["--dynamic", "y:0=batch"], "the model is called without 'y'; it has x"),
        ("export_models:absent", [], "has no 'absent'"),
        ("nothing", [], "neither MODULE:NAME nor hf:MODEL_TYPE"),
    ],
)
def test_misuse_is_one_clear_error(
    folder: Path, model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", model, "--out", str(folder / "m.onnx"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.parametrize("out", ["/no/such/folder/m.onnx", "."])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nothing", "--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"attnopt: path='{out}' ")


def test_the_file_to_write_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "nothing"])
    assert stop.value.code == 2
    assert "--out" in capsys.readouterr().err


def test_dimensions_are_those_of_the_inputs() -> None:
    class Model:
        def forward(self, ids, mask, other=None):
            return ids

    assert dynamic([], Model(), (), {}) is None
    found = dynamic(["mask:0=batch", "ids:1=n,0=b"], Model(), (1,), {"mask": 2, "other": 3})
    assert found == {"ids": {1: "n", 0: "b"}, "mask": {0: "batch"}, "other": None}
    with pytest.raises(OptionError, match="without 'other'"):
        dynamic(["other:0=n"], Model(), (1, 2), {})
