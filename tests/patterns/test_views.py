"""Views say what they cannot prove; items of splits know their offset. Every entry's numbers: test_lift.py."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt.patterns.index import Sizes
from attnopt.patterns.views import VIEWS, pieces, shape, size
from tests.modules import captured

PLACE = sp.Symbol("i", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("run", "name"),
    [(lambda x: x.roll(1), "aten::roll"), (lambda x: x.repeat_interleave(2), "aten::repeat_interleave")],
)
def test_unproven_entries_decline(run, name: str) -> None:  # type: ignore[no-untyped-def]
    from attnopt.graph import arguments

    node = captured(run, torch.ones(2, 3)).gm.graph.output_node().args[0][0]
    with pytest.raises(NotImplementedError):
        VIEWS[name](arguments(node), (PLACE,) * len(shape(node)), shape(node), Sizes({}))


def test_items_of_a_split() -> None:
    graph = captured(lambda x: x.split([1, 3, 2], -1)[2], torch.ones(2, 6)).gm.graph
    whole, dim, offset = pieces(graph.output_node().args[0][0])  # type: ignore[misc]
    assert (whole.op, dim, offset) == ("placeholder", 1, 4)
    assert size(3) == 3
