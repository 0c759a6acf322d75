"""What operators write to and share memory with."""

from __future__ import annotations

import torch

from attnopt.aliasing import aliased, itself, mutated_argument, pure_target
from tests.modules import captured

aten = torch.ops.aten


def test_copies_are_told_from_aliases_by_the_fake_tensors() -> None:
    graph = captured(lambda x: (x.reshape(-1), x.mT.reshape(-1), x.mT.contiguous(), x + 1), torch.ones(3, 4)).gm.graph
    results = graph.output_node().args[0]
    assert [aliased(node) is not None for node in results] == [True, False, False, False]


def test_written_arguments_by_position_and_by_name() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    added = graph.call_function(aten.add_.Tensor, (x, 1))
    assert mutated_argument(added) is x
    assert itself(added) is x
    assert mutated_argument(graph.call_function(aten.add.out, (x, y), {"out": y})) is y
    assert mutated_argument(graph.call_function(aten._foreach_add_.Scalar, ([x, y], 1))) is x
    assert mutated_argument(graph.call_function(aten.add.Tensor, (x, 1))) is None


def test_pure_targets_have_the_same_arguments() -> None:
    assert pure_target(aten.add_.Tensor) is aten.add.Tensor
    assert pure_target(aten.__ior__.Scalar) is aten.__or__.Scalar
    assert pure_target(aten.masked_fill_.Scalar) is aten.masked_fill.Scalar
    assert pure_target(aten.bernoulli_.float) is None
    assert pure_target(aten.add.Tensor) is None
