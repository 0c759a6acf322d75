"""Modes, ties and tensors held outside of parameters: what the original does with them, the optimised model does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attnopt
from tests.modules import SelfAttention

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
TEMPERATURE = torch.tensor(0.5)
SHARPNESS = 2.0
REFERENCE = {"kernel": "reference"}


class _Two(nn.Module):
    """An encoder with dropout and a frozen one, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(0.5), SelfAttention(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("trained", ["first", "second"])
def test_each_part_keeps_its_mode(trained: str) -> None:
    torch.manual_seed(1)
    model = _Two().eval()
    model.get_submodule(trained).train()
    modes = {name: part.training for name, part in model.named_modules()}
    fast = attnopt.optimize(model, (X,), options=REFERENCE)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert {name: part.training for name, part in fast.named_modules()} == modes
    rates = [site.spec.dropout for site in fast.report.sites if site.spec is not None]
    assert rates == ([0.5, 0.0] if trained == "first" else [0.0, 0.5])
    assert not torch.equal(fast(X), fast(X))
    fast.get_submodule(trained).eval()
    torch.testing.assert_close(fast(X), copy.deepcopy(model).eval()(X))
    assert model.get_submodule(trained).training


class _Language(nn.Module):
    """A model whose output layer is its embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 16), SelfAttention()
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(self.embedding(tokens)))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_as_in_the_original(tied: bool) -> None:
    torch.manual_seed(2)
    model, tokens = _Language(tied).eval(), torch.arange(10).view(2, 5)
    fast = attnopt.optimize(model, (tokens,), options=REFERENCE)
    assert (fast.head.weight is fast.embedding.weight) == tied
    assert len(list(fast.parameters())) == len(list(model.parameters()))
    with torch.no_grad():
        fast.embedding.weight.mul_(1.5)
    torch.testing.assert_close(fast(tokens), model(tokens))
    # Untied, or given another value, afterwards: the graph must not read one name for the other.
    fast.head.weight = nn.Parameter(torch.zeros(11, 16))
    assert fast(tokens).abs().max() == 0
    assert (model.head.weight is model.embedding.weight) == tied
    assert model(tokens).abs().max() > 0


class _Outside(nn.Module):
    """Attention that reads a tensor and a number of the file that it is written in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT * TEMPERATURE * SHARPNESS).softmax(-1) @ x


def test_scalars_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Outside()
    monkeypatch.setitem(globals(), "TEMPERATURE", torch.tensor(0.25))
    fast = attnopt.optimize(model, (X,), strict=True, options=REFERENCE)
    torch.testing.assert_close(fast(X), model(X))
    before = fast(X)
    TEMPERATURE.fill_(3.0)
    assert not torch.allclose(model(X), before)
    torch.testing.assert_close(fast(X), model(X))


def test_buffers_made_in_inference_mode() -> None:
    model = SelfAttention().eval()
    with torch.inference_mode():
        model.register_buffer("scale", torch.full((16,), 2.0))
        model.register_buffer("causal", torch.ones(8, 8).tril().bool()[None, None])
    model.forward = _masked.__get__(model)  # type: ignore[method-assign]
    assert model.causal.is_inference()
    fast = attnopt.optimize(model, (X,), strict=True, options=REFERENCE)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X))
        model.scale.fill_(0.5)
        torch.testing.assert_close(fast(X), model(X))


def _masked(self: SelfAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x * self.scale).chunk(3, -1))
    scores = (q @ k.mT).masked_fill(~self.causal[:, :, : x.shape[1], : x.shape[1]], float("-inf"))
    return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class _Adapter(nn.Module):
    """A low-rank change of a linear map, as adapters add it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_is_replaced_is_seen(first: bool) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(SelfAttention(), nn.Linear(16, 16)).eval()
    fast = attnopt.optimize(model, (X,), options=REFERENCE)
    kept = model(X)
    place = "0.out" if first else "1"
    owner, _, leaf = place.rpartition(".")
    part = fast.get_submodule(owner) if owner else fast
    part._modules[leaf] = _Adapter(part._modules[leaf]).eval()
    names = {name for name, _ in fast.named_parameters()}
    assert f"{place}.down.weight" in names
    changed = copy.deepcopy(fast._source)
    torch.testing.assert_close(fast(X), changed(X))
    assert (fast(X) - kept).abs().max() > 1e-3
    assert fast.report.fused == 1
    torch.testing.assert_close(model(X), kept)
