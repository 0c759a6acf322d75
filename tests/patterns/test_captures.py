"""Loaded tensors get names and an order of dimensions that do not depend on the graph's names."""

from __future__ import annotations

import torch

import attnopt
from attnopt.patterns.captures import capture
from attnopt.region import Operand
from tests.modules import Function

Q, BIAS = torch.randn(2, 3, 5, 4), torch.randn(5, 5, 3)
PAD = torch.ones(2, 1, 5, dtype=torch.bool)


def _first(q: torch.Tensor, bias: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    scores = q @ q.mT + bias.permute(2, 0, 1)
    return scores.masked_fill(~pad[:, :, None], float("-inf")).softmax(-1) @ q


def _second(other: torch.Tensor, table: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    hidden = torch.where(seen[:, 0, None, None, :], other @ other.transpose(2, 3) + table.movedim(2, 0), -torch.inf)
    return hidden.softmax(-1) @ other


def test_the_same_attention_has_the_same_captures() -> None:
    specs = [attnopt.explain(Function(f), (Q, BIAS, PAD)).sites[0].spec for f in (_first, _second)]
    assert specs[0] is not None
    assert specs[0] == specs[1]
    assert [(c.name, c.kind, c.shape) for c in specs[0].captures] == [
        ("mask", "bool", (2, 5)),
        ("bias", "float", (3, 5, 5)),
    ]


def test_a_capture_keeps_the_moving_dimensions_in_their_order() -> None:
    graph = torch.export.export(Function(lambda x: x + 1), (torch.zeros(2, 7, 3, dtype=torch.int32),)).graph
    node = next(n for n in graph.nodes if n.op == "placeholder")
    found = capture("ids", Operand(node, ("x1", 4, "x0")))
    assert (found.name, found.kind, found.shape) == ("ids", "int", (3, 2))
