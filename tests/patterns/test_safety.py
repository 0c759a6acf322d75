"""What depends on what, which detach cuts a gradient, and which scores jump."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
from torch import Tensor, fx

from attnopt import expr as ex
from attnopt.patterns.safety import cuts_gradient, depends, jumps, unsafe
from tests.modules import captured

X = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))


def _graph(run: Callable[..., object], *inputs: Tensor) -> dict[str, fx.Node]:
    return {n.name: n for n in captured(run, *inputs).gm.graph.nodes}


def _last(run: Callable[..., object], name: str, *inputs: Tensor) -> fx.Node:
    return [n for n in _graph(run, *inputs).values() if str(n.target) == name][-1]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda s: s.exp().sum(-1), True),
        (lambda s: torch.ones(3, 3) + s.max(), True),
        (lambda s: torch.topk(s, 2).values, True),
        (lambda s: torch.ones(3, 3) * 2, False),
        (lambda s: torch.zeros_like(s) + 1, False),
        (lambda s: s.new_ones(3).cumsum(0), False),
        (lambda s: torch.ones(1, 3).expand_as(s) * 2, False),
        (lambda s: torch.ones(3).type_as(s) + 1, False),
        (lambda s: s.expand_as(torch.ones(3, 3)) + 1, True),
    ],
)
def test_dependence_is_on_elements_not_on_shapes(run: Callable[[Tensor], Tensor], expected: bool) -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ x
        return product, run(product)

    product, found = _graph(both, X)["output"].args[0]  # type: ignore[misc]
    assert depends(found, product) is expected


@pytest.mark.parametrize(
    ("run", "inputs", "expected"),
    [
        (lambda x: x.detach() + 1, (X,), True),
        (lambda x: (x * 2).relu().detach() + 1, (X,), True),
        (lambda i: i.float().mul(2).detach() + 1, (torch.arange(3),), False),
        (lambda x: (x > 0).float().detach() + 1, (X,), False),
        (lambda x: torch.ones(3).detach() + x, (X,), False),
    ],
)
def test_a_detach_cuts_only_what_a_gradient_reaches(run: Callable, inputs: tuple[Tensor, ...], expected: bool) -> None:
    assert cuts_gradient(_last(run, "aten.detach.default", *inputs)) is expected


def test_no_other_operator_cuts() -> None:
    assert not any(cuts_gradient(n) for n in _graph(lambda x: x.relu() + 1, X).values())


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (ex.s * 2 + ex.k, False),
        (sp.tanh(ex.s), False),
        (ex.Where(sp.Lt(ex.k, ex.q), ex.s, sp.S.Zero), False),
        (ex.s + ex.FloorDiv(ex.k, sp.Integer(3)), False),
        (ex.Where(sp.Gt(ex.s, 0), ex.s, sp.S.Zero), True),
        (ex.Trunc(ex.s), True),
        (sp.sign(ex.s) + 1, True),
    ],
)
def test_a_score_that_jumps_is_told_from_one_that_does_not(score: sp.Expr, expected: bool) -> None:
    assert jumps(score) is expected


def test_types_layouts_and_dependence_have_their_own_reasons() -> None:
    nodes = _graph(lambda x: (x @ x, (x @ x).exp(), x.long()), X)
    x, product, later, whole = (nodes[n] for n in ("args_0", "matmul_1", "exp", "to"))
    plain = {"query": x, "key": x, "value": x}
    assert unsafe(plain, (), product, later) is None
    assert "torch.int64" in str(unsafe({**plain, "key": whole}, (), product, later))
    assert "the value is computed from the scores" in str(unsafe({**plain, "value": later}, (), product, later))
    assert "beside query, key and value" in str(unsafe(plain, (later,), product, later))
    sparse = _graph(lambda s, x: s @ x, torch.eye(3).to_sparse(), X)
    assert "layout torch.sparse_coo" in str(
        unsafe({**plain, "query": sparse["args_0"]}, (), sparse["matmul"], sparse["matmul"])
    )
