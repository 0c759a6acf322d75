"""What a region says about its site: operands, captures, scalars, what escapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

from attnopt.patterns import find
from attnopt.region import Region
from tests.modules import captured

Q, K = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8)


def region(run: Any, *inputs: torch.Tensor, **dynamic: Any) -> Region:
    """The single region of a function."""
    graph = captured(run, *inputs, **dynamic)
    (site,) = find(graph.gm.graph, graph.scalars)
    assert isinstance(site[2], Region), site[2]
    return site[2]


def test_operands_and_captures_by_dimension() -> None:
    found = region(
        lambda q, k, bias: (q.transpose(1, 2) @ k.mT + bias[:, :, 0]).softmax(-1) @ k,
        Q.transpose(1, 2),
        K,
        torch.randn(1, 4, 3, 7, 9),
    )
    assert found.query.dims == ("b", "q", "h", "d")
    assert found.key.dims == ("b", "h", "k", "d")
    assert found.batch == ("b",)
    assert found.captures["bias"].dims == (0, "x0", 0, "x1", "x2")


def test_weights_that_are_used_elsewhere_escape() -> None:
    def run(q: torch.Tensor, k: torch.Tensor) -> Any:
        weights = (q @ k.mT).softmax(-1)
        return weights @ k, weights.sum()

    assert region(run, Q, K).escapes == ("softmax",)
    assert region(lambda q, k: (q @ k.mT).softmax(-1) @ k, Q, K).escapes == ()


def test_symbolic_lengths_keep_their_names() -> None:
    shapes = ({2: Dim("n", min=2, max=99)}, {2: Dim("m", min=2, max=99)})

    def run(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        mask = columns[None, :] <= rows[:, None] + k.shape[2] - q.shape[2]
        return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ k

    found = region(run, Q, K, dynamic_shapes=(shapes,))
    assert str(found.spec) == "4 heads, d=8; score s; keep k + n_q <= n_k + q (empty row: nan)"


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_repeated_keys_become_a_table(heads: int) -> None:
    k = torch.randn(2, heads, 9, 8)
    found = region(
        lambda q, k: (q @ k.repeat_interleave(4 // heads, 1).mT).softmax(-1) @ k.repeat_interleave(4 // heads, 1), Q, k
    )
    assert found.spec.heads.k_map == tuple(i * heads // 4 for i in range(4))
