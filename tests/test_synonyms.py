"""Operators by their first names: same schema, same results, whatever name the model used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnopt.graph import op_name
from attnopt.synonyms import _NAMES, _first
from tests.modules import captured

aten = torch.ops.aten
X, Y = (torch.linspace(-2, 2, 12).view(3, 4).sin() * n for n in (1.0, 0.5))
ROWS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor], list[str]], ...] = (
    ("pointwise", lambda x, y: torch.true_divide(torch.multiply(x, y), 3), ["aten::mul", "aten::div"]),
    ("rounded", lambda x, y: torch.divide(x, 0.3, rounding_mode="floor"), ["aten::div"]),
    ("in_place", lambda x, y: (x + y).multiply_(2).clip_(-1, 1), ["aten::add", "aten::mul", "aten::clamp"]),
    ("compared", lambda x, y: torch.greater(x, y).float(), ["aten::gt", "aten::to"]),
    ("softmax", lambda x, y: torch.special.softmax(x, 1, dtype=torch.float64), ["aten::softmax"]),
    ("flat", lambda x, y: torch.ravel(x), ["aten::flatten"]),
    ("columns", lambda x, y: torch.hstack([x, y]), ["aten::cat"]),
    ("columns_of_lines", lambda x, y: torch.hstack([x[0], y[0]]), ["aten::select", "aten::select", "aten::cat"]),
    ("rows", lambda x, y: torch.vstack([x, y]), ["aten::cat"]),
    ("rows_of_lines", lambda x, y: torch.vstack([x[0], y[0]]), ["aten::select", "aten::select", "aten::vstack"]),
    ("depth_of_matrices", lambda x, y: torch.dstack([x, y]), ["aten::dstack"]),
    ("unequal", lambda x, y: ((x > 0) ^ (y > 0)).float(), ["aten::gt", "aten::gt", "aten::bitwise_xor", "aten::to"]),
)  # fmt: skip


@pytest.mark.parametrize(("name", "run", "names"), ROWS, ids=[r[0] for r in ROWS])
def test_the_graph_has_the_first_name(name: str, run: Callable[..., Tensor], names: list[str]) -> None:
    gm = captured(run, X, Y).gm
    assert [op_name(n) for n in gm.graph.nodes if n.op == "call_function"] == names
    (found,) = gm(X, Y)
    torch.testing.assert_close(found, run(X, Y), rtol=0, atol=0)


def test_both_names_take_the_same_arguments() -> None:
    """Every overload of a second name is called with the arguments of the first."""
    changed = 0
    for second in _NAMES:
        for packet in (getattr(aten, second, None), getattr(aten, f"{second}_", None)):
            for overload in packet.overloads() if packet is not None else ():
                before = getattr(packet, overload)
                after = _first(before)
                changed += after is not before
                given = [[(a.name, str(a.type)) for a in x._schema.arguments] for x in (before, after)]
                assert given[0] == given[1], f"{before} and {after}"
    assert changed >= 2 * len(_NAMES)
