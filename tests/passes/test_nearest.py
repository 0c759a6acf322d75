"""Near misses: which operator stands between a softmax and the product of queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnopt.graph import op_name
from attnopt.passes.nearest import blocking
from tests.modules import captured

X = torch.randn(2, 5, 5)
CASES: tuple[tuple[Callable[..., torch.Tensor], str | None], ...] = (
    (lambda x: (x @ x.mT).softmax(-1), None),
    (lambda x: (x @ x.mT / 3 + torch.arange(5)).masked_fill(x > 0, -1e4).reshape(2, 5, 5).softmax(-1), None),
    (lambda x: (x @ x.mT).sort(-1).values.softmax(-1), "aten::sort"),
    (lambda x: (x @ x.mT).cumsum(-1).mul(2).softmax(-1), "aten::cumsum"),
    (lambda x: (x.cumsum(-1) @ x.mT).softmax(-1), None),  # before the product is no obstacle
    (lambda x: (x.cumsum(-1).flip(-1).sort(-1).values + 1).softmax(-1), "aten::sort"),
)


@pytest.mark.parametrize(("run", "name"), CASES)
def test_the_last_unknown_operator_is_named(run: Callable[..., torch.Tensor], name: str | None) -> None:
    graph = captured(run, X).gm.graph
    (anchor,) = (n for n in graph.nodes if op_name(n) == "aten::softmax")
    found = blocking(anchor)
    assert (op_name(found) if found is not None else None) == name
