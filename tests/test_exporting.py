"""The capture's own `torch.export`: masks stay data, what it prints stays away, what has no gradient is captured too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.modules import transformer

import attnopt
from attnopt.exporting import export

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_a_mask_is_not_compared_with_the_causal_one() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    fast = attnopt.optimize(model, (X, causal), options={"kernel": "reference"})
    assert [str(s.spec) for s in fast.report.sites] == ["2 heads, d=8; score 0.353553*s + bias[q, k]"]
    other = torch.linspace(-1, 1, 25).view(5, 5)
    for mask in (causal, other):
        torch.testing.assert_close(fast(X, mask), model(X, mask), rtol=1e-5, atol=1e-6)


def test_the_patched_function_comes_back() -> None:
    before = transformer._detect_is_causal_mask
    with pytest.raises(RuntimeError):
        export(_Branch(), (X,), {}, None)
    assert transformer._detect_is_causal_mask is before


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if bool((x.softmax(-1) > 0).all()) else x


def test_a_capture_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="data-dependent"):
        export(_Branch(), (X,), {}, None)
    out, err = capfd.readouterr()
    assert "def forward" not in out + err
    assert "Unable to find user code" not in err


class _Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return flex_attention(q, k, v)


def test_attention_without_a_gradient_is_captured_for_parameters_that_want_one() -> None:
    torch.manual_seed(0)
    model = _Flex()
    program, functions = export(model, (X,), {}, None)
    assert functions == set()
    assert "flex_attention" in str(program.graph)
    fast = attnopt.optimize(model, (X,), options={"kernel": "reference"})
    assert [s.status for s in fast.report.sites] == ["fused"]
    assert not fast.report.notes
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-5, atol=1e-6)
