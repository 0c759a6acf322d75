"""Indices as arrays: what views and strides do to them is what they do to elements."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.patterns.grids import MOST, Grid, Positions, Unproven, axis, combined, evaluated, plain, strided
from tests.modules import captured

SHAPES = (((4, 6, 5), (2, 12, 5)), ((4, 6, 5), (4, 30)), ((2, 3, 4), (6, 1, 4)), ((6, 5), (5, 6)))


@pytest.mark.parametrize(("new", "old"), SHAPES)
def test_reshape_finds_every_element(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(old)).reshape(old)
    index = [axis(i, n, len(new)) for i, n in enumerate(new)]
    at = Grid().reshape(index, [sp.Integer(n) for n in new], [sp.Integer(n) for n in old])
    assert at is not None
    assert np.array_equal(np.broadcast_to(numbers[tuple(plain(i) for i in at)], new), numbers.reshape(new))


def test_an_index_has_the_elements_of_its_own_coordinates_only() -> None:
    index = [axis(i, n, 3) for i, n in enumerate((8, 6, 5))]
    (head, row, column, last) = Grid().reshape(
        index, [sp.Integer(n) for n in (8, 6, 5)], [sp.Integer(n) for n in (2, 4, 6, 5)]
    )  # type: ignore[misc]
    assert [plain(i).shape for i in (head, row, column, last)] == [(8, 1, 1), (8, 1, 1), (1, 6, 1), (1, 1, 5)]


@pytest.mark.parametrize(
    ("shape", "sizes", "strides"),
    [((3, 12, 4), (3, 5, 4, 4), (48, 8, 4, 1)), ((3, 12, 4), (3, 12, 4), (48, 4, 1)), ((2, 20), (2, 4, 6), (20, 4, 1))],
)
def test_strides_find_every_element(shape: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
    numbers = torch.arange(np.prod(shape)).view(shape)
    node = captured(lambda x: x * 1, numbers).gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[
        0
    ]
    index = [axis(i, n, len(sizes)) for i, n in enumerate(sizes)]
    at = strided(node, sizes, strides, index, np.ones([1] * len(sizes), dtype=bool))
    found = np.broadcast_to(numbers.numpy()[tuple(plain(i) for i in at)], sizes)
    assert np.array_equal(found, numbers.as_strided(sizes, strides).numpy())


def test_strides_beyond_the_tensor_are_not_followed() -> None:
    node = captured(lambda x: x * 1, torch.ones(4, 4)).gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.mul.Tensor
    )[0]
    index, every = [axis(i, n, 2) for i, n in enumerate((5, 4))], np.ones((1, 1), dtype=bool)
    assert strided(node, (5, 4), (4, 1), index, every) is None
    inside = plain(index[0]) < 4
    assert strided(node, (5, 4), (4, 1), index, inside) is not None


def test_index_expressions_are_evaluated() -> None:
    x, y = sp.symbols("x y", integer=True, nonnegative=True)
    at = {x: axis(0, 6, 2), y: axis(1, 4, 2)}
    found = evaluated(ex.FloorDiv(4 * x + y, sp.Integer(3)) + ex.Mod(y, sp.Integer(2)), at)
    rows, columns = np.arange(6)[:, None], np.arange(4)
    assert np.array_equal(plain(found), (4 * rows + columns) // 3 + columns % 2)
    with pytest.raises(Unproven):
        evaluated(x**2, at)


def test_arithmetic_with_sympys_numbers_and_its_bound() -> None:
    x = axis(0, 5, 1)
    assert plain(sp.Integer(7) - x * sp.Integer(2) + 1).tolist() == [8, 6, 4, 2, 0]
    assert plain(Grid().mod(x, sp.Integer(3))).tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(Unproven, match=str(MOST)):
        combined(np.add, Positions(np.zeros((1 << 13, 1))), Positions(np.zeros((1, 1 << 12))))
