"""Attentions that stay as they are, are declined by their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from tests.forms import QKV, numbers, scores


class Model(nn.Module):
    """A function of q, k, v and parameters."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run
        shapes = {
            "kernel": (4, 1, 3, 3),
            "heads": (4, 4),
            "a": (8, 8),
            "b": (8, 8),
            "one": (1, 8),
            "both": (8, 16),
            "token": (1, 4, 1, 8),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(numbers(*shape)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run(self, q, k, v)


def _conv(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.kernel, padding=1, groups=4)


def _sinkhorn(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    for _ in range(2):
        weights = weights / weights.sum(-2, keepdim=True)
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def _sinkhorn_in_logarithms(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = scores(q, k)
    for _ in range(2):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp() @ v


def _sparsemax(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    z = s.sort(-1, descending=True).values
    total = z.cumsum(-1) - 1
    count = (torch.arange(1, 10) * z > total).sum(-1, keepdim=True)
    return (s - total.gather(-1, count - 1) / count).clamp(min=0) @ v


def _top_k(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.masked_fill(s < s.topk(3, -1).values[..., -1:], -torch.inf).softmax(-1) @ v


def _top_weights(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return (weights * (weights >= weights.topk(3, -1).values[..., -1:])) @ v


def _additive(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.tanh((q @ m.a)[:, :, :, None] + (k @ m.b)[:, :, None])
    return F.linear(hidden, m.one).squeeze(-1).softmax(-1) @ v


def _concatenated(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pairs = [q[:, :, :, None].expand(-1, -1, -1, 9, -1), k[:, :, None].expand(-1, -1, 7, -1, -1)]
    return F.linear(F.linear(torch.cat(pairs, -1), m.both).tanh(), m.one).squeeze(-1).softmax(-1) @ v


def _graph(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.leaky_relu(F.linear(q, m.one) + F.linear(k, m.one).mT, 0.2).softmax(-1) @ v


def _gaussian(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-(q[:, :, :, None] - k[:, :, None]).pow(2).sum(-1) / 2).softmax(-1) @ v


def _learned_query(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CaiT's class attention: the query is a parameter, and heads are mixed before and after."""
    mixed = torch.einsum("bhij,hg->bgij", scores(m.token.expand(2, -1, -1, -1), k), m.heads).softmax(-1)
    return torch.einsum("bhij,hg->bgij", mixed, m.heads) @ v


def _mixed_and_normed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepViT: the weights of all heads mixed, then a norm over the heads."""
    mixed = torch.einsum("bhij,hg->bgij", scores(q, k).softmax(-1), m.heads)
    return F.layer_norm(mixed.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2) @ v


NAMED = (
    ("heads_of_a_learned_query", _learned_query, "talking heads: a linear map mixes the scores"),
    ("heads_mixed_and_normed", _mixed_and_normed, "talking heads: a linear map mixes the weights"),
    ("convolved_scores", lambda m, q, k, v: _conv(m, scores(q, k)).softmax(-1) @ v, "multi-token attention: a convolution mixes the scores"),
    ("convolved_weights", lambda m, q, k, v: _conv(m, scores(q, k).softmax(-1)) @ v, "multi-token attention: a convolution mixes the weights"),
    ("heads_by_linear", lambda m, q, k, v: F.linear(scores(q, k).permute(0, 2, 3, 1), m.heads).permute(0, 3, 1, 2).softmax(-1) @ v, "talking heads: a linear map mixes the scores"),
    ("heads_by_product", lambda m, q, k, v: (scores(q, k).permute(0, 2, 3, 1) @ m.heads).permute(0, 3, 1, 2).softmax(-1) @ v, "talking heads: a linear map mixes the scores"),
    ("heads_by_einsum", lambda m, q, k, v: torch.einsum("bhij,hg->bgij", scores(q, k).softmax(-1), m.heads) @ v, "talking heads: a linear map mixes the weights"),
    ("heads_by_convolution", lambda m, q, k, v: F.conv2d(scores(q, k), m.heads[:, :, None, None]).softmax(-1) @ v, "talking heads: a linear map mixes the scores"),
    ("sinkhorn", _sinkhorn, "Sinkhorn attention"),
    ("sinkhorn_in_logarithms", _sinkhorn_in_logarithms, "Sinkhorn attention"),
    ("sparsemax", _sparsemax, "sparsemax or entmax"),
    ("top_k", _top_k, "top-k attention: which keys are kept follows from the sorted scores"),
    ("top_weights", _top_weights, "top-k attention: which keys are kept follows from the sorted weights"),
    ("additive", _additive, "additive attention"),
    ("concatenated", _concatenated, "additive attention"),
    ("graph", _graph, "graph attention"),
    ("gaussian", _gaussian, "Gaussian kernel attention"),
    ("gaussian_by_cdist", lambda m, q, k, v: (-torch.cdist(q, k) ** 2).softmax(-1) @ v, "Gaussian kernel attention"),
    ("gaussian_unnormalised", lambda m, q, k, v: torch.exp(-torch.cdist(q, k) ** 2) @ v, "Gaussian kernel attention"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "run", "reason"), NAMED, ids=lambda x: x if isinstance(x, str) and " " not in x else ""
)
def test_form_is_named_and_left_alone(name: str, run: Any, reason: str) -> None:
    model = Model(run)
    fast = attnopt.optimize(model, QKV)
    assert [s.status for s in fast.report.sites] == ["declined"], str(fast.report)
    assert fast.report.sites[0].reason.startswith(reason)
    torch.testing.assert_close(fast(*QKV), model(*QKV), rtol=0, atol=0)


def _expanded(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The squared distance written out: the product is there."""
    return (2 * q @ k.mT - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[:, :, None]).softmax(-1) @ v


FUSED = (
    ("plain", lambda m, q, k, v: scores(q, k).softmax(-1) @ v),
    ("cosine", lambda m, q, k, v: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10).softmax(-1) @ v),
    ("expanded_distance", _expanded),
    ("convolved_keys", lambda m, q, k, v: scores(q, F.conv2d(k, m.kernel, padding=1, groups=4)).softmax(-1) @ v),
    ("mixed_values", lambda m, q, k, v: scores(q, k).softmax(-1) @ torch.einsum("bhij,hg->bgij", v, m.heads)),
    ("sorted_values", lambda m, q, k, v: scores(q, k).softmax(-1) @ v.sort(-1).values),
)


@pytest.mark.parametrize(("name", "run"), FUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_only_resembles_them_is_fused(name: str, run: Any) -> None:
    report = attnopt.optimize(Model(run), QKV, options=attnopt.Options(kernel="reference")).report
    assert [s.status for s in report.sites] == ["fused"], str(report)


def test_a_router_is_no_attention() -> None:
    def run(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights, chosen = (q @ m.a).softmax(-1).topk(2, -1)
        return weights.unsqueeze(-2) @ m.b[chosen]

    assert attnopt.optimize(Model(run), QKV).report.sites == ()
