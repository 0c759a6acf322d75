"""Values over a grid: cases by layout, what is computed between layouts as expressions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import expr as ex
from attnopt.patterns.coordinates import Axes
from attnopt.patterns.enumerated import Case, Enumeration, mark
from attnopt.patterns.grids import Unproven
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from tests.modules import captured

X, Y = torch.randn(2, 6, 4), torch.randn(2, 6, 4)


def _cases(run: Callable[..., Tensor]) -> list[Case]:
    node = captured(run, X, Y).gm.graph.output_node().args[0][0]
    axes = Axes(node, 1)
    return Enumeration(Lifter(Sizes({})), ()).cases(node, tuple(c.at for c in axes.coordinates), axes.everywhere)


def _exprs(run: Callable[..., Tensor]) -> set[str]:
    return {str(case.expr) for case in _cases(run)}


def test_what_is_computed_between_two_layouts_is_read() -> None:
    found = _exprs(lambda x, y: F.pad(F.pad(x, (0, 1)) * 2 + 1, (1, 0)))
    assert found == {"0", "1", "2*Load(at_args_0) + 1"}


def test_cases_of_two_operands_meet() -> None:
    found = _exprs(lambda x, y: F.pad(x, (0, 2)) + F.pad(y, (2, 0), value=-torch.inf))
    assert found == {"Load(at_args_0) - oo", "Load(at_args_0) + Load(at_args_1)", "Load(at_args_1)"}


def test_a_product_of_one_term_is_a_product() -> None:
    found = _cases(lambda x, y: torch.einsum("bqd,bkd->bqk", F.pad(x, (0, 0, 0, 2))[..., :1], torch.ones(2, 6, 1)))
    assert {str(case.expr) for case in found} == {"0", "Load(at_args_0)"}


def test_a_contraction_is_a_mark_with_its_place() -> None:
    (case,) = _cases(lambda x, y: (x @ y.mT)[:, 1:] * 0.5)
    ((node, piece),) = case.marks
    assert node.name == "matmul"
    assert case.expr == mark(node) / 2
    assert piece.index[1].at.ravel().tolist() == [1, 2, 3, 4, 5]


def test_masks_by_data_are_kept_as_tests() -> None:
    (case,) = _cases(lambda x, y: x.masked_fill(y == 0, -torch.inf))
    assert isinstance(case.expr, ex.Where)
    assert case.expr.has(ex.NEG_INF)
    assert {node.name for node, _ in case.marks} == {"args_0", "args_1"}


def test_one_node_at_two_places_is_unproven() -> None:
    with pytest.raises(Unproven, match="two places"):
        _cases(lambda x, y: F.pad(x, (1, 0)) + F.pad(x, (0, 1)))


def test_too_many_cases_are_unproven() -> None:
    with pytest.raises(Unproven, match="cases"):
        _cases(lambda x, y: torch.cat([(x * n)[:, :1] for n in range(1, 70)], 1))


def test_numbers_stay_numbers() -> None:
    assert {case.expr for case in _cases(lambda x, y: x.new_zeros(2, 3).tril())} == {sp.S.Zero}
