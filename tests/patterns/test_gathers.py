"""Gathers that cannot be proven are loaded. Every rule's numbers: test_lift.py."""

from __future__ import annotations

import torch

from tests.modules import captured
from tests.patterns.elements import PLACES, Recorder, lifted

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_an_index_from_data_that_may_count_from_the_end_is_loaded() -> None:
    graph = captured(lambda x, i: x[i], X, torch.tensor([-1, 0]))
    runner = Recorder(graph.gm)
    (out,) = runner.run(X, torch.tensor([-1, 0]))
    node = graph.gm.graph.output_node().args[0][0]
    assert len(PLACES) >= out.dim()
    torch.testing.assert_close(lifted(graph.gm.graph, node, runner.seen), out.double())
