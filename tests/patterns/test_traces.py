"""Where elements come from: followed back, every element is the one that the graph computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.patterns.grids import Unproven, axis, plain
from attnopt.patterns.traces import Piece, Tracer
from tests.modules import captured

X, Y = torch.randn(2, 8, 6), torch.randn(2, 3, 6)


def _written(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(2, 8, 6)
    out[:, 1:7, 2:] = x[:, :6, :4]
    out[:, -3:] = y
    return out


ROWS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("pad", lambda x, y: F.pad(x, (1, 2, 0, 1), value=3.0)),
    ("pad_negative", lambda x, y: F.pad(x, (-1, 2))),
    ("sheared", lambda x, y: F.pad(x, (0, 9)).flatten(1)[:, :-8].reshape(2, 8, 14)[:, :, :-1]),
    ("cat", lambda x, y: torch.cat([y, x, y[:, :1]], 1)),
    ("stack", lambda x, y: torch.stack([x[:, :3], y], 2)),
    ("written", _written),
    ("select_scatter", lambda x, y: torch.select_scatter(x, y[:, 1], 1, -2)),
    ("slice_scatter", lambda x, y: torch.slice_scatter(x, y, 1, 1, 7, 2)),
    ("unfold", lambda x, y: x.unfold(1, 3, 2)),
    ("strided", lambda x, y: x.contiguous().as_strided((2, 3, 4, 6), (48, 12, 6, 1))),
    ("roll", lambda x, y: x.roll((1, -2), (1, 2))),
    ("flip", lambda x, y: x.flip(1)),
    ("where", lambda x, y: torch.where(torch.ones(8, 6).tril() > 0, x, -torch.inf)),
    ("masked_fill", lambda x, y: x.masked_fill(torch.arange(8)[:, None] > torch.arange(6), 2.0)),
    ("masked_by_new_ones", lambda x, y: x.masked_fill(x.new_ones(8, 6).triu(1).bool(), 2.0)),
    ("split", lambda x, y: x.split([3, 5], 1)[1].transpose(1, 2)),
)  # fmt: skip


def _pieces(run: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Piece], tuple[int, ...]]:
    node = captured(run, *inputs).gm.graph.output_node().args[0][0]
    shape = tuple(node.meta["val"].shape)
    index = tuple(axis(i, n, len(shape)) for i, n in enumerate(shape))
    return Tracer().pieces(node, index, np.ones([1] * len(shape), dtype=bool)), shape


@pytest.mark.parametrize(("name", "run"), ROWS, ids=[name for name, _ in ROWS])
def test_every_element_is_found(name: str, run: Callable[[Tensor, Tensor], Tensor]) -> None:
    pieces, shape = _pieces(run, X, Y)
    inputs = {"x": X.numpy(), "y": Y.numpy()}
    found, seen = np.full(shape, np.nan), np.zeros(shape, dtype=int)
    for piece in pieces:
        if piece.number is None:
            source = inputs["x" if piece.node.meta["val"].shape == X.shape else "y"]
            index = [np.clip(plain(i), 0, n - 1) for i, n in zip(piece.index, source.shape, strict=True)]
        element = np.asarray(piece.number) if piece.number is not None else source[tuple(index)]
        holds = np.broadcast_to(piece.holds, shape)
        found[holds], seen = np.broadcast_to(element, shape)[holds], seen + holds
    assert (seen == 1).all()
    assert np.array_equal(found, run(X, Y).double().numpy())


def test_what_is_computed_is_the_end_of_the_way() -> None:
    pieces, _ = _pieces(lambda x, y: F.pad(x.exp(), (0, 1)), X, Y)
    assert sorted((p.number, "" if p.number is not None else p.node.name) for p in pieces if p.number is None) == [
        (None, "exp")
    ]
    assert [node.name for node, _ in next(p for p in pieces if p.number is None).way] == ["pad", "exp"]


def test_a_mask_by_data_is_no_layout() -> None:
    (piece,), _ = _pieces(lambda x, y: x.masked_fill(x > 0, 0.0), X, Y)
    assert piece.node.name == "masked_fill"


def test_parts_of_another_type_are_not_followed() -> None:
    (piece,), _ = _pieces(lambda x, y: torch.cat([x, y.double()], 1), X, Y)
    assert piece.node.name == "cat"


def test_unknown_sizes_are_unproven() -> None:
    length = torch.export.Dim("n", min=2, max=64)
    graph = captured(lambda x: F.pad(x, (0, 1)), X, dynamic_shapes={"args": ({1: length},)}).gm.graph
    node = graph.output_node().args[0][0]
    with pytest.raises(Unproven, match="sizes"):
        Tracer().pieces(node, tuple(axis(i, 2, 3) for i in range(3)), np.ones((1, 1, 1), dtype=bool))
