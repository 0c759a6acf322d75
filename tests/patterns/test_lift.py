"""Lifting: the expression of a node, evaluated at every index, is the node's tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnopt.patterns.gathers import __doc__ as _gathers
from attnopt.patterns.ops import POINTWISE
from attnopt.patterns.views import VIEWS
from tests.modules import captured
from tests.patterns.elements import Recorder, lifted

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
N = torch.tensor([[3, 0, 2], [1, 1, 0]])
MASK = X[0] > 0
Run = Callable[[torch.Tensor], torch.Tensor]


def _written(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[0, 0] = 4
    y[..., -2:].mul_(2)
    return y


ROWS: tuple[tuple[str, Run], ...] = (
    ("view", lambda x: x.view(3, 8)), ("flatten", lambda x: x.flatten(1)), ("unflatten", lambda x: x.unflatten(2, (2, 2))),
    ("reshape", lambda x: x.mT.reshape(6, 4)), ("expand", lambda x: x[:, :1].expand(2, 5, 4)), ("permute", lambda x: x.permute(2, 0, 1)),
    ("transpose", lambda x: x.transpose(0, -1)), ("swapaxes", lambda x: x.swapaxes(0, 1)), ("mT", lambda x: x.mT), ("t", lambda x: x[0].t()),
    ("movedim", lambda x: x.movedim(0, 2)), ("unsqueeze", lambda x: x.unsqueeze(-2)), ("squeeze", lambda x: x[:, :1].squeeze(1)),
    ("squeeze_all", lambda x: x[:, :1].squeeze()), ("slice", lambda x: x[:, 1:, ::2]), ("slice_end", lambda x: x[..., -3:-1]),
    ("narrow", lambda x: x.narrow(2, 1, 2)), ("select", lambda x: x[:, -1]), ("flip", lambda x: x.flip(0, -1)),
    ("roll", lambda x: x.roll((1, -2), (1, 2))), ("repeat", lambda x: x.repeat(2, 1, 3)),
    ("repeat_interleave", lambda x: x.repeat_interleave(3, 1)), ("split", lambda x: x.split(3, -1)[1]), ("chunk", lambda x: x.chunk(2, -1)[1]),
    ("unbind", lambda x: x.unbind(1)[2]), ("add", lambda x: x + 2), ("add_alpha", lambda x: torch.add(x, x[0], alpha=3)),
    ("sub", lambda x: torch.sub(x, 1, alpha=2)), ("rsub", lambda x: 1 - x), ("mul", lambda x: x * x[:, :1]), ("div", lambda x: x / 3),
    ("floor_divide", lambda x: torch.arange(7) // 3), ("remainder", lambda x: torch.arange(7) % 3), ("neg", lambda x: -x), ("abs", lambda x: x.abs()),
    ("sign", lambda x: x.sign()), ("exp", lambda x: x.exp()), ("log", lambda x: x.abs().log()), ("tanh", lambda x: x.tanh()),
    ("sin", lambda x: x.sin()), ("cos", lambda x: x.cos()), ("erf", lambda x: x.erf()), ("sigmoid", lambda x: x.sigmoid()),
    ("relu", lambda x: x.relu()), ("sqrt", lambda x: x.abs().sqrt()), ("rsqrt", lambda x: x.abs().rsqrt()), ("reciprocal", lambda x: x.reciprocal()),
    ("pow", lambda x: x**3), ("square", lambda x: x.square()), ("clamp", lambda x: x.clamp(-0.5, 0.5)), ("clamp_min", lambda x: x.clamp_min(0.1)),
    ("clamp_max", lambda x: x.clamp_max(0.1)), ("clamp_one_side", lambda x: x.clamp(max=0.2)), ("maximum", lambda x: torch.maximum(x, x.flip(0))),
    ("minimum", lambda x: torch.minimum(x, x.flip(0))), ("where", lambda x: torch.where(x > 0, x, -1.0)),
    ("masked_fill", lambda x: x.masked_fill(x > 0.5, 7)), ("comparisons", lambda x: (x >= 0) & ~(x < -1) | (x.eq(0)) | x.ne(1) & (x <= 2)),
    ("logic", lambda x: torch.logical_xor(x > 0, torch.logical_not(x > 1)).logical_and(x > -1).logical_or(x < -2)),
    ("bool_times_bool", lambda x: (x > 0) * (x < 1)), ("cast_to_int", lambda x: (x * 3).to(torch.int64)), ("cast_to_bool", lambda x: x.long().bool()),
    ("trunc", lambda x: (x * 3).trunc()), ("tril", lambda x: x.tril(1)), ("triu", lambda x: (x > 0).triu(-1)),
    ("cat", lambda x: torch.cat([x, x[:, :1] * 2, x[:, 1:]], 1)), ("stack", lambda x: torch.stack([x, x + 1], 1)),
    ("index", lambda x: x[:, torch.tensor([2, 0])]), ("index_two", lambda x: x[torch.tensor([[0], [1]]), torch.tensor([2, 1])]),
    ("negative_index", lambda x: x[:, torch.arange(-2, 1)]), ("index_select", lambda x: x.index_select(1, torch.tensor([2, 2, 0]))),
    ("embedding", lambda x: torch.nn.functional.embedding(torch.arange(3), x[0])), ("arange", lambda x: torch.arange(9, 2, -2)),
    ("zeros", lambda x: torch.zeros_like(x)), ("full", lambda x: torch.full((2, 2), 5.0)), ("written", _written),
    ("diff", lambda x: torch.diff(torch.arange(3, 7), prepend=torch.tensor([2]))), ("diff_of_data", lambda x: torch.diff(x.long(), dim=1, prepend=x[:, :1].long())),
    ("diff_of_a_stride", lambda x: torch.diff(torch.arange(0, 9, 2), prepend=torch.arange(1) - 1)), ("diff_plain", lambda x: torch.diff(x)),
    ("cumsum_of_zeros", lambda x: (torch.arange(5) < 0).cumsum(0)), ("cumsum", lambda x: (torch.arange(5) > 2).cumsum(0)), ("cumsum_of_data", lambda x: x.cumsum(1)),
    ("cumsum_of_a_diagonal", lambda x: torch.ones(4, 4, dtype=torch.long).triu(1).cumsum(1).diagonal()),
    ("cumsum_read_at_its_row", lambda x: (torch.arange(4)[:, None] != torch.arange(4)).cumsum(1)[torch.arange(4), torch.arange(4)]),
    ("dropout_off", lambda x: torch.nn.functional.dropout(x, 0.5, False)), ("linspace_is_loaded", lambda x: torch.linspace(0, 1, 3) + x[0, 0, 0]),
)  # fmt: skip


@pytest.mark.parametrize(("name", "run"), ROWS, ids=[name for name, _ in ROWS])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_every_element(name: str, run: Run, deep: bool) -> None:
    graph = captured(run, X)
    runner = Recorder(graph.gm)
    (out,) = runner.run(*[graph.constants[s] for s in graph.states], X)
    node = graph.gm.graph.output_node().args[0][0]
    found = lifted(graph.gm.graph, node, runner.seen, deep)
    # Values are computed exactly; eager rounds a handful of float32 operations.
    torch.testing.assert_close(found, out.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_tables_name_known_operators() -> None:
    assert _gathers
    for name in (*POINTWISE, *VIEWS):
        assert hasattr(torch.ops.aten, name.split("::")[1].split(".")[0]), name


def test_what_was_asked_for_is_remembered() -> None:
    graph = captured(lambda x: (x + 1).mT, X)
    node = graph.gm.graph.output_node().args[0][0]
    assert lifted(graph.gm.graph, node, {"args_0": X}).shape == (2, 4, 3)
