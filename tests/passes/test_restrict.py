"""Restricted nodes equal a selection of the original, and push it as far back as the operators allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.graph import aten
from attnopt.passes.restrict import Restrictor
from tests.passes.tiny import captured

F = nn.functional


class _Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's result."""
        return self.function(x)


def restricted(
    function: Callable[[Tensor], Tensor], x: Tensor, dim: int, keep: tuple[int, ...]
) -> tuple[Tensor, list[str]]:
    """The value of `take` on the output of a traced function, and the operators whose results are smaller."""
    gm = captured(_Model(function), x).gm
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    (last,) = output.args[0]
    restrictor = Restrictor(gm, [])
    new = restrictor.take(last, dim, keep)
    output.args = ((new,),)
    gm.graph.lint()
    gm.recompile()
    (result,) = gm(x)
    assert tuple(new.meta["val"].shape) == tuple(result.shape)
    return result, [n.target._schema.name for n in restrictor.created if n.op == "call_function"]


CASES = {
    "view": (lambda x: x.view(2, 3, 2, 4), (2, 3, 8), 2, (1,)),
    "merge": (lambda x: x.reshape(6, 8), (2, 3, 8), 0, (0, 2, 3, 5)),
    "merge of a product": (lambda x: x.reshape(6, 8), (2, 3, 8), 0, (0, 2, 3, 5)),
    "permute": (lambda x: x.permute(2, 0, 1), (2, 3, 8), 0, (0, 5)),
    "transpose": (lambda x: x.transpose(0, -1), (2, 3, 8), 0, (3, 4)),
    "unsqueeze": (lambda x: x.unsqueeze(1) * 2, (2, 3, 8), 2, (0, 2)),
    "squeeze": (lambda x: x.squeeze(0) * 2, (1, 3, 8), 0, (0, 2)),
    "slice": (lambda x: x[..., 2:7] + 1, (2, 3, 8), 2, (0, 4)),
    "slice elsewhere": (lambda x: x[:, 1:] + 1, (2, 3, 8), 2, (0, 4)),
    "select": (lambda x: x[:, 1] + 1, (2, 3, 8), 1, (0, 4)),
    "split": (lambda x: x.split([2, 6], -1)[1] + 1, (2, 3, 8), 2, (0, 4)),
    "unbind": (lambda x: x.unbind(1)[2] + 1, (2, 3, 8), 1, (0, 4)),
    "cat elsewhere": (lambda x: torch.cat((x, -x), 1), (2, 3, 8), 2, (0, 4)),
    "cat along": (lambda x: torch.cat((x, -x), 2), (2, 3, 8), 2, (0, 9)),
    "broadcast": (lambda x: x + torch.ones(8) * x[:, :1], (2, 3, 8), 1, (0, 2)),
    "expand": (lambda x: x[:, None].expand(2, 4, 3, 8) * 1, (2, 3, 8), 1, (0, 3)),
    "softmax": (lambda x: x.softmax(-1), (2, 3, 8), 1, (0, 2)),
    "softmax along": (lambda x: x.softmax(-1), (2, 3, 8), 2, (0, 2)),
    "mean": (lambda x: x.mean(-1), (2, 3, 8), 1, (0, 2)),
    "mean kept": (lambda x: x - x.mean(-1, keepdim=True), (2, 3, 8), 1, (0, 2)),
    "norm": (lambda x: F.rms_norm(x, (8,)), (2, 3, 8), 1, (0, 2)),
    "matmul": (lambda x: x @ x.transpose(1, 2).contiguous(), (4, 3, 8), 0, (1, 3)),
    "matmul rows": (lambda x: x @ x.transpose(1, 2).contiguous(), (4, 3, 8), 1, (0, 2)),
    "matmul columns": (lambda x: x @ x.transpose(1, 2).contiguous(), (4, 3, 8), 2, (0, 2)),
    "einsum": (lambda x: torch.einsum("bid,bjd->bij", x, x * 2), (4, 3, 8), 0, (1, 3)),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x * 2, x), (2, 4, 3, 8), 1, (0, 3)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (2, 3, 8), 1, (0, 1, 5)),
    "uneven repeats": (lambda x: x.repeat_interleave(2, 1), (2, 3, 8), 1, (0, 2, 3)),
    "repeat by expand": (lambda x: x[:, :, None].expand(2, 3, 2, 8).reshape(2, 6, 8), (2, 3, 8), 1, (0, 4, 5)),
    "unknown": (lambda x: x.cumprod(1), (2, 3, 8), 2, (0, 1)),
    "roll": (lambda x: x.roll(1, 2), (2, 3, 8), 2, (0, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_restriction_equals_a_selection(case: str) -> None:
    function, shape, dim, keep = CASES[case]
    x = torch.randn(shape, dtype=torch.float64)
    seen, _ = restricted(function, x, dim, keep)
    torch.testing.assert_close(seen, function(x).index_select(dim, torch.tensor(keep)), rtol=1e-12, atol=1e-12)


def test_the_selection_is_made_at_the_source() -> None:
    _, made = restricted(lambda x: (x * 2).view(2, 3, 2, 4).transpose(1, 2).softmax(-1), torch.randn(2, 3, 8), 1, (1,))
    assert made == ["aten::narrow", "aten::mul", "aten::reshape", "aten::transpose", "aten::softmax"]


def test_an_unknown_operator_is_computed_whole() -> None:
    _, made = restricted(lambda x: x.cumprod(1), torch.randn(2, 3, 8), 2, (0, 5))
    assert made == ["aten::index_select"]


def test_everything_kept_is_the_node_itself() -> None:
    gm = captured(_Model(lambda x: x * 2), torch.randn(2, 3)).gm
    (node,) = (n for n in gm.graph.nodes if n.target is aten.mul.Tensor)
    assert Restrictor(gm, []).take(node, 1, (0, 1, 2)) is node


def test_undo_leaves_the_graph_as_it_was() -> None:
    gm = captured(_Model(lambda x: x.view(2, 3, 2, 4).softmax(-1)), torch.randn(2, 3, 8)).gm
    before, last = str(gm.graph), list(gm.graph.nodes)[-2]
    restrictor = Restrictor(gm, [])
    restrictor.take(last, 2, (1,))
    assert str(gm.graph) != before
    restrictor.undo()
    assert str(gm.graph) == before
