"""One softmax over several sets of keys: read as one attention over all, or left alone with its graph unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attnopt
from attnopt.patterns import find
from attnopt.region import Region
from tests.modules import Function, captured

Tensors = tuple[torch.Tensor, ...]
G = torch.Generator().manual_seed(5)
Q, LOCAL = torch.randn(2, 3, 4, 5, 8, generator=G), torch.randn(2, 3, 4, 6, 8, generator=G)
GLOBAL, BIAS = torch.randn(2, 3, 7, 8, generator=G), torch.randn(2, 1, 1, 1, 13, generator=G)
INPUTS = (Q, GLOBAL, LOCAL, BIAS)


def _weights(q: torch.Tensor, one: torch.Tensor, two: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    first, second = torch.einsum("bhnqd,bhkd->bhnqk", q, one), torch.einsum("bhnqd,bhnkd->bhnqk", q, two)
    return (torch.cat([first, second], -1) + bias).softmax(-1)


def _cut(*inputs: torch.Tensor) -> torch.Tensor:
    one, two = inputs[1], inputs[2]
    w = _weights(*inputs)
    first = torch.einsum("bhnqk,bhkd->bhnqd", w[..., :7], one.sin())
    return first + torch.einsum("bhnqk,bhnkd->bhnqd", w[..., 7:], two.cos())


def _split(*inputs: torch.Tensor) -> torch.Tensor:
    one, two = inputs[1], inputs[2]
    near, far = torch.dropout(_weights(*inputs), 0.1, False).split([7, 6], -1)
    return far @ two.cos() + near @ one[:, :, None].sin()


@pytest.mark.parametrize("run", [_cut, _split])
def test_it_is_one_attention(run: Callable[..., torch.Tensor]) -> None:
    fast = attnopt.optimize(Function(run), INPUTS, strict=True, options={"kernel": "reference"})
    (site,) = fast.report.sites
    assert (site.pattern, str(site.spec)) == ("joined", "4 heads, d=8; score s + bias[b//3, k]")
    torch.testing.assert_close(fast(*INPUTS), run(*INPUTS))
    ours, theirs = ([x.double().requires_grad_() for x in INPUTS] for _ in range(2))
    for model, inputs in (
        (attnopt.optimize(Function(run), ours, options={"kernel": "reference"}), ours),
        (run, theirs),
    ):
        model(*inputs).square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def _overlapping(*inputs: torch.Tensor) -> torch.Tensor:
    w = _weights(*inputs)
    return w[..., :7] @ inputs[1][:, :, None] + w[..., 6:12] @ inputs[2]


def _swapped(*inputs: torch.Tensor) -> torch.Tensor:
    """The first six weights, some of which are global, meet the local values."""
    w = _weights(*inputs)
    return w[..., :6] @ inputs[2] + w[..., 6:] @ inputs[1][:, :, None]


def _subtracted(*inputs: torch.Tensor) -> torch.Tensor:
    w = _weights(*inputs)
    return w[..., :7] @ inputs[1][:, :, None] - w[..., 7:] @ inputs[2]


def _other_queries(*inputs: torch.Tensor) -> torch.Tensor:
    q, one, two, bias = inputs
    w = (torch.cat([q @ one[:, :, None].mT, q.sin() @ two.mT], -1) + bias).softmax(-1)
    return w[..., :7] @ one[:, :, None] + w[..., 7:] @ two


def _left_out(*inputs: torch.Tensor) -> torch.Tensor:
    return _weights(*inputs)[..., :7] @ inputs[1][:, :, None]


def _read_elsewhere(*inputs: torch.Tensor) -> Tensors:
    w = _weights(*inputs)
    return w[..., :7] @ inputs[1][:, :, None] + w[..., 7:] @ inputs[2], w.sum(-1)


@pytest.mark.parametrize(
    "run", [_overlapping, _swapped, _subtracted, _other_queries, _left_out, _read_elsewhere], ids=lambda r: r.__name__
)
def test_it_is_left_alone(run: Callable[..., torch.Tensor]) -> None:
    graph = captured(run, *INPUTS).gm.graph
    before = [n.name for n in graph.nodes]
    assert not any(isinstance(result, Region) for _, _, result in find(graph))
    assert [n.name for n in graph.nodes] == before


def test_a_second_search_finds_the_same() -> None:
    graph = captured(_cut, *INPUTS).gm.graph
    first, second = find(graph), find(graph)
    assert [(anchor, name) for anchor, name, _ in first] == [(anchor, name) for anchor, name, _ in second]
    assert len(second) == 1
