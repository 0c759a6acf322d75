"""Gathers that cannot be proven are loaded. Every rule's numbers: test_lift.py."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
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


def _documents(positions: torch.Tensor) -> torch.Tensor:
    """As transformers finds packed sequences: a new one begins where a position is not one more than that before."""
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _places(run: Any, *inputs: torch.Tensor) -> sp.Basic:
    graph = captured(run, *inputs)
    node = graph.gm.graph.output_node().args[0][0]
    index = PLACES[: node.meta["val"].dim()]
    sizes = Sizes(dict(zip(index, map(sp.Integer, node.meta["val"].shape), strict=True)))
    return Lifter(sizes).lift(node, index)


def test_positions_that_count_up_hold_one_sequence() -> None:
    x, offset = torch.zeros(2, 9), 5
    assert _places(lambda x: _documents((torch.arange(9) + offset)[None].expand(2, -1)), x) == 0
    for positions in (lambda: torch.arange(0, 18, 2), lambda: torch.arange(9) // 4, lambda: torch.arange(9) % 4):
        assert _places(lambda x, made=positions: _documents(made()[None].expand(2, -1)), x) != 0


def test_positions_of_the_user_are_read() -> None:
    found = _places(_documents, torch.arange(9).expand(2, -1).contiguous())
    assert [load.args[0].name for load in found.atoms(ex.Load)] == ["cumsum"]


def test_a_sum_along_a_diagonal_is_no_sum_of_its_ends() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(4)
        return (place[:, None] != place).cumsum(1)[place, place]

    assert _places(run, torch.zeros(1)) != 0
