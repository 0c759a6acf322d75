"""What is taken for finite, and what may be a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnopt.graph import op_name
from attnopt.patterns.finite import is_finite
from attnopt.patterns.known import Known


class Parts(nn.Module):
    """Tensors of every kind, each the last call of its method."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("slopes", torch.tensor([[0.5, 0.25]]))
        self.register_buffer("fill", torch.full((2, 2), torch.finfo(torch.float32).min))

    def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
        return {
            "product": lambda: x @ x,
            "gathered product": lambda: (x @ x)[:, torch.tensor([0, 1])] * 2.0,
            "parameter": lambda: self.table.transpose(0, 1) + 1.0,
            "bounded": lambda: torch.sigmoid(x).reshape(-1),
            "piece": lambda: F.linear(x, self.table).split(2, -1)[0],
            "buffer": lambda: self.slopes * 2.0,
            "input": lambda: x * 2.0,
            "filled": lambda: (x @ x).masked_fill(x > 0, float("-inf")),
            "huge constant": lambda: (x @ x) * 1e30,
            "fill": lambda: self.fill + 0.0,
            "exponential": lambda: torch.exp(x @ x),
        }[which]()


@pytest.mark.parametrize(
    ("which", "expected"),
    [(name, True) for name in ("product", "gathered product", "parameter", "bounded", "piece", "buffer")]
    + [(name, False) for name in ("input", "filled", "huge constant", "fill", "exponential")],
)
def test_finite(which: str, expected: bool) -> None:
    model = Parts()
    graph = torch.export.export(model, (torch.randn(5, 5), which)).graph
    last = next(
        n for n in reversed(graph.nodes) if n.op == "call_function" and op_name(n) != "aten::_assert_tensor_metadata"
    )
    known = Known({}, {"b_slopes": model.slopes, "b_fill": model.fill})
    assert is_finite(last, known) is expected
