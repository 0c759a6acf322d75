"""Lowering: layouts of the output, prepared captures, what is declined."""

from __future__ import annotations

import pytest
import torch

import attnopt
from tests.modules import Function

Q, K = torch.randn(2, 3, 4, 7, 8), torch.randn(2, 3, 4, 9, 8)
RUNS = (
    ("two_batches", lambda q, k: (q @ k.mT).softmax(-1) @ k),
    ("no_batch", lambda q, k: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ k[0, 0]),
    ("one_head", lambda q, k: (q[0, 0, 0] @ k[0, 0, 0].mT).softmax(-1) @ k[0, 0, 0]),
    ("viewed_after", lambda q, k: ((q @ k.mT).softmax(-1) @ k).transpose(2, 3).reshape(2, 3, 7, 32)),
    ("batch_of_keys_is_shared", lambda q, k: (q @ k[:1, :1].mT).softmax(-1) @ k[:1, :1]),
    ("one_bias_two_sites", lambda q, k: sum((q * s @ k.mT + k[0, 0, :, :7, :1]).softmax(-1) @ k for s in (1, 2))),
)


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[r[0] for r in RUNS])
def test_layouts(name: str, run: object) -> None:
    fast = attnopt.optimize(Function(run), (Q, K), strict=True)  # type: ignore[arg-type]
    torch.testing.assert_close(fast(Q, K), run(Q, K))  # type: ignore[operator]


def test_active_dropout_draws_a_new_mask_at_every_call() -> None:
    run = Function(lambda q, k: torch.dropout((q @ k.mT).softmax(-1), 0.5, True) @ k)
    fast = attnopt.optimize(run, (Q, K), strict=True, options={"kernel": "reference"})
    torch.manual_seed(1)
    first, second = fast(Q, K), fast(Q, K)
    torch.manual_seed(1)
    assert torch.equal(fast(Q, K), first)
    assert not torch.equal(first, second)


def test_a_size_that_is_read_from_data() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        width = n.item()
        torch._check(width >= 2)
        torch._check(width <= 9)
        keep = torch.arange(9) < torch.ones(width).shape[0]
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ k

    inputs = Q[0], K[0]
    fast = attnopt.optimize(Function(run), (*inputs, torch.tensor(5)), strict=True, options={"kernel": "reference"})
    assert len(fast.report.sites[0].spec.scalars) == 1
    for width in (2, 7):
        n = torch.tensor(width)
        torch.testing.assert_close(fast(*inputs, n), run(*inputs, n))
