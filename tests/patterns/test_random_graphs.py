"""Random graphs around two contractions, every size 4: whatever is fused agrees in fp64 with its source, gradients too.

Most of these graphs are no attention. Nothing tells which but their meaning: sizes and positions never do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.options import Options

N, SEEDS, PARTS = 4, 80, 4


def _tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LINE, BIAS, PAIRS, FULL = (_tensor(*[N] * rank, seed=rank) for rank in (1, 2, 3, 4))
QKV = tuple(_tensor(N, N, N, N, seed=10 + i) for i in range(3))
ORDER = torch.tensor([2, 0, 3, 1])

Step = Callable[[Tensor], Tensor]
VIEWS: tuple[Step, ...] = (
    lambda x: x.mT, lambda x: x.transpose(1, 2), lambda x: x.transpose(0, 1), lambda x: x.flip(-1), lambda x: x.flip(1),
    lambda x: x.roll(1, -2), lambda x: x.roll(1, 1), lambda x: x.permute(0, 3, 1, 2), lambda x: x.detach(),
    lambda x: x[:, :1].expand(-1, N, -1, -1), lambda x: x[:, :2].repeat_interleave(2, 1), lambda x: x[:, :2].repeat(1, 2, 1, 1),
    lambda x: x.reshape(N, N, 2, 2, N).transpose(2, 3).reshape(N, N, N, N), lambda x: torch.cat([x[:, :, 2:], x[:, :, :2]], 2),
    lambda x: x[:, :, ::2], lambda x: x[..., :2], lambda x: x[:1], lambda x: x * 0.5 + 1, lambda x: F.normalize(x, dim=-1),
)  # fmt: skip
PRODUCTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda q, k: q @ k.mT, lambda q, k: q @ k, lambda q, k: k @ q.mT, lambda q, k: (k @ q.mT).mT,
    lambda q, k: torch.einsum("bhqd,bhkd->bhkq", q, k), lambda q, k: torch.einsum("bqhd,bkhd->bhqk", q, k),
    lambda q, k: torch.einsum("hbqd,bhkd->bhqk", q, k),
    lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(N, N, N, N),
)  # fmt: skip
SCORES: tuple[Step, ...] = (
    lambda s: s * 0.5, lambda s: s + BIAS, lambda s: s + PAIRS, lambda s: s + FULL, lambda s: s + LINE[:, None],
    lambda s: s * LINE[:, None, None], lambda s: s.masked_fill(BIAS > 0, -1e4), lambda s: 5 * torch.tanh(s / 5),
    lambda s: s.masked_fill(torch.ones(N, N).tril() == 0, float("-inf")), lambda s: s.mT, lambda s: s.transpose(1, 2),
    lambda s: s.roll(1, -1), lambda s: s.flip(-2), lambda s: s.tril(), lambda s: s - s.amax(-1, keepdim=True),
    lambda s: s - s.amax(-2, keepdim=True), lambda s: s / s.std(-1, keepdim=True), lambda s: s.mul_(0.5), lambda s: s.detach(),
    lambda s: s.masked_fill_(BIAS > 0, -1e4), lambda s: s * LINE + s.mT, lambda s: s[..., :2], lambda s: s.cumsum(-1),
    lambda s: torch.einsum("gh,bhqk->bgqk", BIAS, s), lambda s: s.sort(-1).values, lambda s: F.pad(s, (1, 0)),
)  # fmt: skip
NORMALISERS: tuple[Step, ...] = (
    *[lambda s: s.softmax(-1)] * 6, lambda s: s.softmax(-2), lambda s: s.softmax(1), lambda s: s.softmax(0),
    lambda s: s.log_softmax(-1).exp(), lambda s: s.exp() / s.exp().sum(-1, keepdim=True), lambda s: s.sigmoid(),
    lambda s: s.exp() / s.exp().sum(-2, keepdim=True), lambda s: s.exp() / (1 + s.exp().sum(-1, keepdim=True)),
    lambda s: s.relu() / N, lambda s: s / s.abs().sum(-1, keepdim=True), lambda s: s.softmax(-1) - 0.3 * s.mT.softmax(-1),
)  # fmt: skip
WEIGHTS: tuple[Step, ...] = (
    lambda p: p * 2, lambda p: p * LINE, lambda p: p * LINE[:, None], lambda p: p * LINE[:, None, None], lambda p: p.mT,
    lambda p: p.transpose(1, 2), lambda p: p.roll(1, -1), lambda p: p.roll(1, -2), lambda p: p.flip(-1), lambda p: p[..., :2],
    lambda p: p / p.sum(-1, keepdim=True), lambda p: p / p.sum(-2, keepdim=True), lambda p: p * FULL, lambda p: p.detach(),
    lambda p: p + torch.eye(N), lambda p: p[..., ORDER], lambda p: p.tril(), lambda p: torch.where(p > 0.3, p, 0.0),
    lambda p: p.softmax(-1), lambda p: p.masked_fill(BIAS > 0, 0), lambda p: torch.einsum("gh,bhqk->bgqk", BIAS, p),
)  # fmt: skip
APPLIED: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *[lambda p, v: p @ v] * 5, lambda p, v: p @ v.mT, lambda p, v: v @ p, lambda p, v: v.mT @ p.mT,
    lambda p, v: torch.einsum("bhqk,bhkd->bqhd", p, v), lambda p, v: torch.einsum("bhqk,bhqd->bhkd", p, v),
    lambda p, v: torch.einsum("bhqk,bkhd->bhqd", p, v), lambda p, v: torch.einsum("bhqk,hbkd->bhqd", p, v),
    lambda p, v: torch.einsum("bhqk,bhkd->bqd", p, v), lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)),
)  # fmt: skip


class Graph(nn.Module):
    """One draw of every step; some draws do not fit together."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.views = [draw.choices(VIEWS, k=draw.choice((0, 0, 1))) for _ in range(3)]
        self.product, self.normaliser, self.applied = (draw.choice(x) for x in (PRODUCTS, NORMALISERS, APPLIED))
        self.scores = draw.choices(SCORES, k=draw.choice((0, 1, 1, 2)))
        self.weights = draw.choices(WEIGHTS, k=draw.choice((0, 0, 1)))
        self.returned = draw.random() < 0.15

    def forward(self, *inputs: Tensor) -> Any:
        """The output, and for some draws the sum of the weights."""
        q, k, v = inputs
        q, k, v = (_chain(x, steps) for x, steps in zip((q, k, v), self.views, strict=True))
        weights = _chain(self.normaliser(_chain(self.product(q, k), self.scores)), self.weights)
        out = self.applied(weights, v)
        return (out, weights.sum()) if self.returned else out


def _chain(x: Tensor, steps: list[Step]) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _outcome(model: nn.Module) -> list[Tensor]:
    """Outputs and gradients; a gradient that nothing reaches is zero."""
    inputs = [x.clone().requires_grad_() for x in QKV]
    results = model(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in results)
    if total.requires_grad:
        total.backward()
    return [*(x.detach() for x in results), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)]


@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_fused_agrees(part: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        model = Graph(seed)
        try:
            golden = _outcome(model)
        except (RuntimeError, IndexError):  # shapes that do not fit, or a write that cannot be differentiated
            outcomes["invalid"] += 1
            continue
        fast = attnopt.optimize(model, QKV, validate=False, options=Options(kernel="reference"))
        outcomes["fused" if fast.report.fused else "left alone"] += 1
        for x, y in zip(golden, _outcome(fast), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-8, atol=1e-9, equal_nan=True, msg=f"seed {seed}: {fast.report}")
    assert outcomes["fused"] >= SEEDS // 8, outcomes
    assert outcomes["left alone"] >= SEEDS // 8, outcomes
