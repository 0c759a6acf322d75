from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from attnopt.coverage import graphs
from attnopt.coverage.graphs import Double, double, short, treat
from attnopt.errors import CaptureError
from attnopt.options import Options

REFERENCE = Options(kernel="reference")


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.mT * 0.25, -1) @ x


class _Breaking(nn.Module):
    """Attention on both sides of a branch on data, which no single graph holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.softmax(x @ x.mT * 0.25, -1) @ x
        if x.sum().item() > 0:
            x = x + 1
        return torch.softmax(x @ x.mT * 0.5, -1) @ x


def _treated(model: nn.Module) -> tuple[Any, torch.Tensor]:
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    return treat(model, {"x": x}, REFERENCE), x


def test_a_model_is_captured_counted_and_lowered() -> None:
    treated, x = _treated(_Attention())
    assert treated.way == "export"
    assert [(s["status"], s["lengths"]) for s in treated.sites] == [("fused", (8, 8))]
    assert not treated.missed
    torch.testing.assert_close(treated.run(), _Attention()(x))


def test_a_model_with_graph_breaks_goes_through_dynamo() -> None:
    treated, x = _treated(_Breaking())
    assert treated.way.startswith("dynamo")
    assert len(treated.graphs) == 2
    assert [s["status"] for s in treated.sites] == ["fused", "fused"]
    torch.testing.assert_close(treated.run(), _Breaking()(x))


def test_a_graph_that_cannot_be_traced_further_is_unknown_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gm: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        raise CaptureError("no trace\nof it")

    monkeypatch.setattr(graphs, "retrace", refuse)
    treated, x = _treated(_Breaking())
    assert treated.unknown == [{"why": "no trace of it", "normalizers": 1}] * 2
    assert not treated.sites
    torch.testing.assert_close(treated.run(), _Breaking()(x))


def test_a_pair_agrees_in_double() -> None:
    treated, _ = _treated(_Attention())
    before, after = treated.graphs[0].in_double()
    assert before[0].dtype == torch.float64
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)


def test_casts_to_fp32_become_casts_to_fp64() -> None:
    gm = torch.fx.symbolic_trace(lambda x: torch.ops.aten.to.dtype(x, torch.float32) * 2)
    assert Double(gm).run(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert double(torch.bfloat16) is torch.bfloat16


def test_a_source_is_named_from_its_package_on() -> None:
    assert short("/a/lib/python3.11/site-packages/transformers/x.py:3") == "transformers/x.py:3"
    assert short("model.py:3") == "model.py:3"
