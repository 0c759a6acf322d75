"""Models after each approximate rewrite: exported, run in ONNX Runtime, compared; what has no operator says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.onnx import export
from attnopt.rewrites import FactorBias, Linearize, MixHeads, PruneHeads, ShareKV, Sparsify
from tests.onnx.models import ATTENTION, GROUPED, HEADS, _ids, _llama_config, _model, gpt2, hf

for needed in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(needed)

ANY = 1e6  # what a random model loses says nothing


def _llama() -> tuple[nn.Module, dict[str, Any]]:
    ids = _ids(2, 20)
    config = _llama_config(attn_implementation="sdpa", num_key_value_heads=4)
    return _model(hf.LlamaModel, config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _swin() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.SwinConfig(
        image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4, attn_implementation="eager"
    )
    return _model(hf.SwinModel, config), {"pixel_values": torch.randn(1, 3, 16, 16)}


@dataclass(frozen=True)
class Row:
    """A model, a rewrite, the target, what the attention becomes, and, for a reference graph, a part of the reason."""

    name: str
    build: Any
    rewrite: Any
    target: str
    kernel: str
    reason: str = ""
    opset: int = 24
    vary: bool = False

    def __str__(self) -> str:
        return self.name


ROWS = (
    Row("ShareKV aligned", _llama, ShareKV(2, method="aligned"), "ort", ATTENTION, vary=True),
    Row("PruneHeads", _llama, PruneHeads(heads={0: [1]}), "ort", HEADS),
    Row("MixHeads norm", _llama, MixHeads(1, 2, always=True), "onnx", ATTENTION),
    Row("MixHeads linear", gpt2, MixHeads(1, 2, router="linear", always=True), "ort", GROUPED),
    Row("Sparsify window", _llama, Sparsify("window", window=8, sinks=2, always=True), "ort", HEADS),
    Row("Sparsify blocks", _llama, Sparsify("blocks", top=2, block=4, tile=4, always=True), "onnx", ATTENTION),
    Row("FactorBias", _swin, FactorBias(rank=2, when="always"), "ort", HEADS),
    Row("Linearize", _llama, Linearize("elu", length=65536), "onnx", "reference graph", "normaliser", vary=True),
    Row(
        "Linearize window", _llama, Linearize("hedgehog", window=4, steps=1, length=65536, progress=False), "onnx",
        "reference graph", "elsewhere linear over",
    ),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_rewritten_model_is_exported_as_what_it_has_become(row: Row, tmp_path: Path) -> None:
    model, inputs = row.build()
    sizes = {name: {0: "batch", 1: "tokens"} for name in inputs} if row.vary else None
    report = export(
        model, (), tmp_path / "m.onnx", inputs, target=row.target, opset=row.opset, rewrites=[row.rewrite],
        tolerance=ANY, calibration=[inputs], dynamic_shapes=sizes,
    )  # fmt: skip
    assert ("validation at other sizes" in report.figures) == row.vary
    assert {site.kernel for site in report.sites} == {row.kernel.replace("-23", f"-{row.opset}")}
    assert {site.rewrites for site in report.sites} == {(row.rewrite.name,)}
    assert all(row.reason in site.reason and (site.status == "declined") == bool(row.reason) for site in report.sites)
    figures = report.figures["validation"]
    assert figures["rms"] <= 1.2 * figures["eager_rms"] + 4.8e-7


def test_what_was_rewritten_before_is_exported_as_it_is(tmp_path: Path) -> None:
    """The file has the rewritten module's results, which are not those of the model before."""
    import onnxruntime

    model, inputs = _llama()
    fast = attnopt.optimize(
        model, (), inputs, rewrites=[ShareKV(1, method="mean")], tolerance=ANY, options={"kernel": "reference"}
    )
    report = export(fast, (), tmp_path / "m.onnx", inputs)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {n: x.numpy() for n, x in inputs.items()})[0])
    with torch.no_grad():
        wanted, before = fast(**inputs)[0], model(**inputs)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    assert [(site.spec.heads.q, site.spec.heads.k) for site in report.sites] == [(4, 1)]
