"""What one element depends on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from torch import Tensor, nn

from attnopt.patterns.dependence import Walk, evaluate, pointwise
from attnopt.patterns.index import Sizes
from attnopt.patterns.views import shape
from tests.passes.tiny import captured


class _Made(nn.Module):
    """A function of a linear map with twelve features."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 12), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def _features(function: Callable[[Tensor], Tensor]) -> list[set[int]]:
    """For each place of the result's last dimension, the linear features that it is made from."""
    gm = captured(_Made(function), torch.randn(2, 4)).gm
    node = list(gm.graph.nodes)[-1].args[0][0]
    marks = [sp.Symbol(f"i{d}", integer=True, nonnegative=True) for d in range(len(shape(node)))]
    sizes = Sizes(dict(zip(marks, shape(node), strict=True)))
    walk = Walk(sizes, None)
    walk.visit(node, tuple(marks), ())
    found: list[set[int]] = [set() for _ in range(int(shape(node)[-1]))]
    for leaf in walk.leaves:
        for place, rows in evaluate(leaf, leaf.index[-1], sizes, {marks[-1]} | walk.fresh, marks[-1]):
            found[place] |= rows
    return found


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda y: y * 2, [{i} for i in range(12)]),
        (lambda y: y[:, 3:7].exp(), [{3}, {4}, {5}, {6}]),
        (lambda y: torch.cat((-y[:, 6:8], y[:, :2]), -1), [{6}, {7}, {0}, {1}]),
        (lambda y: y[:, :3] + y[:, 3:6], [{0, 3}, {1, 4}, {2, 5}]),
        (lambda y: y.view(2, 3, 4).mean(-1), [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}]),
        (lambda y: y.view(2, 3, 4).mean(1), [{0, 4, 8}, {1, 5, 9}, {2, 6, 10}, {3, 7, 11}]),
        (lambda y: nn.functional.layer_norm(y[:, :3], (3,)), [{0, 1, 2}] * 3),
        (lambda y: y[:, :3].softmax(-1), [{0, 1, 2}] * 3),
        (lambda y: y.flip(1), [{11 - i} for i in range(12)]),
    ],
)
def test_features_of_each_element(function: Callable[[Tensor], Tensor], expected: list[set[int]]) -> None:
    assert _features(function) == expected


def test_an_unknown_operator_ends_the_walk() -> None:
    assert _features(lambda y: y.sort(-1).values) == [set()] * 12


def test_pointwise_operators_are_told_by_their_tag() -> None:
    gm = captured(_Made(lambda y: y.sigmoid().cumprod(0)), torch.randn(2, 4)).gm
    kinds = {n.target._schema.name: pointwise(n) for n in gm.graph.nodes if n.op == "call_function"}
    assert kinds == {"aten::linear": False, "aten::sigmoid": True, "aten::cumprod": False}
