"""Selections behind reshapes and repetitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from attnopt.passes.regroup import _group, _product
from attnopt.patterns.views import size
from tests.passes.test_restrict import restricted


@pytest.mark.parametrize(
    ("old", "new", "dim", "group"),
    [
        ((2, 16, 64), (2, 16, 4, 16), 2, ([2], [2, 3])),
        ((2, 16, 4, 16), (2, 16, 64), 2, ([2, 3], [2])),
        ((2, 16, 4, 16), (32, 64), 1, ([2, 3], [1])),
        ((32, 64), (2, 16, 64), 2, ([1], [2])),
        ((6, 4), (4, 6), 0, ([0, 1], [0, 1])),
        ((2, 3, 1, 4), (2, 3, 4), 2, ([2, 3], [2])),
    ],
)
def test_groups_are_the_fewest_neighbours(
    old: tuple[int, ...], new: tuple[int, ...], dim: int, group: tuple[list[int], list[int]]
) -> None:
    found = _group([size(n) for n in old], [size(n) for n in new], dim)
    assert found is not None
    assert [d for d in found[0] if old[d] != 1] == [d for d in group[0] if old[d] != 1]
    assert found[1] == group[1]


def test_products_of_selections_are_told_from_other_sets() -> None:
    assert _product((0, 2, 6, 8), [2, 2, 3]) == [(0, 1), (0,), (0, 2)]
    assert _product((0, 2, 6), [2, 2, 3]) is None


@pytest.mark.parametrize("keep", list(itertools.combinations(range(6), 3)))
def test_repeated_heads_are_repeated_as_often_as_they_are_used(keep: tuple[int, ...]) -> None:
    def repeat(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None].expand(2, 3, 2, 4).reshape(2, 6, 4)

    x = torch.randn(2, 3, 4)
    seen, made = restricted(repeat, x, 1, keep)
    assert torch.equal(seen, repeat(x)[:, list(keep)])
    counts = {sum(i // 2 == head for i in keep) for head in {i // 2 for i in keep}}
    # One table may pick the heads; another is needed only where heads are used unequally often.
    assert made.count("aten::index_select") <= 1 + (len(counts) > 1)
