"""Values that are known when the graph is captured, and tables that are formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnopt
from attnopt.patterns.known import Known, two_valued
from tests.modules import captured

ONES = torch.ones(6, 9)
TABLES = {
    "causal": (ONES.tril().bool(), "-_i + _j <= 0"),
    "causal of floats": (ONES.tril(), "Where(-_i + _j <= 0, 1, 0)"),
    "additive": (torch.full((6, 9), -torch.inf).triu(1), "Where(-_i + _j <= 0, 0, -oo)"),
    "shifted": (ONES.tril(2).bool(), "-_i + _j <= 2"),
    "window": (ONES.tril(1).triu(-2).bool(), "(-_i + _j >= -2) & (-_i + _j <= 1)"),
    "blocks": (torch.eye(3).repeat_interleave(2, 0).repeat_interleave(3, 1)[:, :6].bool(), None),
    "square blocks": (torch.eye(3).repeat_interleave(2, 0).repeat_interleave(2, 1).bool(), "Eq(FloorDiv(_i, 2), FloorDiv(_j, 2))"),
    "three values": (torch.arange(54).view(6, 9) % 3, None),
    "irregular": (ONES.tril().bool() ^ (torch.arange(54).view(6, 9) == 7), None),
    "constant": (ONES, None),
    "not a number": (torch.where(ONES.tril() > 0, torch.nan, 0.0), None),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_a_formula_only_if_every_element_agrees(name: str) -> None:
    table, expected = TABLES[name]
    found = two_valued(table)
    assert (None if found is None else str(found)) == expected


class Nano(nn.Module):
    """nanoGPT's way: a causal buffer for the longest sequence, sliced to this one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).split(16, -1))
        n = x.shape[1]
        scores = (q @ k.mT) * 8**-0.5
        return scores.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf")).softmax(-1) @ v


def _pair() -> tuple[Nano, torch.Tensor]:
    torch.manual_seed(0)
    return Nano().eval(), torch.randn(2, 12, 16)


def test_a_causal_buffer_is_proven_causal() -> None:
    model, x = _pair()
    fast = attnopt.optimize(model, (x,))
    assert str(fast.report.sites[0].spec).endswith("keep k <= q (empty row: nan)")
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_a_buffer_that_changes_is_read_again(change: str) -> None:
    model, x = _pair()
    fast = attnopt.optimize(model, (x,))
    window = torch.ones(1, 1, 32, 32).tril().triu(-3)
    if change == "in place":
        fast.mask.copy_(window)
    elif change == "replaced":
        fast.mask = window
    else:
        fast.load_state_dict({**fast.state_dict(), "mask": window})
    model.mask.copy_(window)
    torch.testing.assert_close(fast(x), model(x))
    assert "q <= k + 3" in str(fast.report.sites[0].spec)


def test_what_an_input_reaches_is_not_known() -> None:
    model, x = _pair()
    program = torch.export.export(model, (x,))
    tables = {"b_mask": model.mask}
    known = Known({}, tables)
    found = {n.name for n in program.graph.nodes if n.op == "call_function" and known.tensor(n) is not None}
    assert any(name.startswith("eq") for name in found)
    assert not any(name.startswith(("linear", "matmul", "softmax")) for name in found)


def test_a_seeded_draw_is_not_known() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand(3, 3) + torch.ones(3, 3)

    graph = torch.export.export(Noisy(), (torch.ones(3, 3),)).graph
    known = {n.name for n in graph.nodes if n.op == "call_function" and Known({}).tensor(n) is not None}
    assert known == {"ones"}


def test_a_search_that_gives_up_says_nothing_of_what_it_did_not_reach() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(250):
            x = x + 1
        return x.masked_fill(torch.ones(3, 3).tril() > 0, 0.0)

    graph = captured(run, torch.ones(3, 3)).gm.graph
    filled = next(node for node in graph.nodes if "masked_fill" in str(node.target))
    known = Known({})
    assert known.tensor(filled) is None
    mask = known.tensor(filled.args[1])
    assert mask is not None
    assert torch.equal(mask, torch.ones(3, 3).tril() > 0)
