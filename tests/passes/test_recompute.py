"""Weights that a model returns: made again by the operator where they are known, kept as they are where not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import attnopt

HEADS, WIDTH = 2, 8


class Attends(nn.Module):
    """Attention by heads, whose weights go through `then`."""

    def __init__(self, then: Callable[[Tensor, Tensor], tuple[Tensor, ...]], dropout: float = 0.0) -> None:
        super().__init__()
        self.then, self.dropout = then, dropout
        self.maps = nn.ModuleList(nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (m(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for m in self.maps)
        scores = (q @ k.mT) / WIDTH**0.5
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return self.then(weights @ v, weights)


def _optimised(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    fast = attnopt.optimize(model, (x,))
    assert [s.status for s in fast.report.sites] == ["fused"]
    (compiled,) = fast._compiled.values()
    return fast, [str(n.target) for n in compiled.captured.gm.graph.nodes if n.op == "call_function"]


def test_returned_weights_are_made_again() -> None:
    model, x = Attends(lambda out, weights: (out, weights)).eval(), torch.randn(2, 6, HEADS * WIDTH)
    fast, names = _optimised(model, x)
    assert any("attention_side" in name for name in names)
    assert not any("softmax" in name for name in names)
    assert not fast.report.notes
    with torch.no_grad():
        assert_close(fast(x), model(x))


def test_their_gradients_are_those_of_the_source() -> None:
    model, x = Attends(lambda out, weights: (out, weights)).eval(), torch.randn(2, 6, HEADS * WIDTH)
    fast, _ = _optimised(model, x)
    grads = []
    for run in (fast, model):
        given = x.clone().requires_grad_()
        out, weights = run(given)
        grads.append(torch.autograd.grad((out**2).sum() + (weights**2).sum(), given)[0])
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    "then",
    [
        lambda out, weights: (out, weights.mean(1)),
        lambda out, weights: (out + weights.sum() * 0, weights[:, 0]),
    ],
)
def test_what_is_made_of_them_stays(then: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
    model, x = Attends(then).eval(), torch.randn(2, 6, HEADS * WIDTH)
    fast, names = _optimised(model, x)
    assert any("attention_side" in name for name in names)
    with torch.no_grad():
        assert_close(fast(x), model(x))


def test_a_user_before_the_result_keeps_the_source() -> None:
    class Early(Attends):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (m(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for m in self.maps)
            weights = ((q @ k.mT) / WIDTH**0.5).softmax(-1)
            largest = weights.amax(-1)
            return weights @ v, largest

    model, x = Early(lambda out, weights: (out,)).eval(), torch.randn(2, 6, HEADS * WIDTH)
    fast, names = _optimised(model, x)
    assert not any("attention_side" in name for name in names)
    assert "still computed" in fast.report.notes[0]
    with torch.no_grad():
        assert_close(fast(x), model(x))


class Written(Attends):
    """As transformers write it: the softmax in fp32, an additive mask, a row that keeps nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (m(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for m in self.maps)
        mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(), torch.finfo(x.dtype).min
        )
        scores = (q @ k.mT) / WIDTH**0.5 + mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        weights = nn.functional.dropout(weights, 0.1, self.training)
        return self.then(weights @ v, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_transformers_write_it(dtype: torch.dtype) -> None:
    model = Written(lambda out, weights: (out, weights)).eval().to(dtype)
    x = torch.randn(2, 6, HEADS * WIDTH, dtype=dtype)
    fast, names = _optimised(model, x)
    assert any("attention_side" in name for name in names)
    with torch.no_grad():
        (out, weights), (want, kept) = fast(x), model(x)
    assert weights.dtype == kept.dtype
    assert_close(weights, kept)
    assert_close(out, want, atol=0.02 if dtype is torch.bfloat16 else 1e-5, rtol=0.02)
    assert_close(weights[:, :, 0], torch.full_like(weights[:, :, 0], 1 / 6))  # the first query keeps no key


def test_autocast_keeps_its_dtypes() -> None:
    x = torch.randn(2, 6, HEADS * WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        model = Attends(lambda out, weights: (out, weights)).eval()
        fast, _ = _optimised(model, x)
        assert [t.dtype for t in fast(x)] == [t.dtype for t in model(x)]
