"""Graphs that no recogniser expects: passed through with a reason or fused rightly, and never an error of attnopt's.

Each row goes through every door: `explain`, `optimize` and the `torch.compile` backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils import _pytree as pytree

import attnopt
from attnopt.dynamo import reports
from attnopt.runtime.validate import compare, nudge
from tests.modules import Function
from tests.unusual_graphs import NESTED, QKV, ROWS, Row, attend


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Every row runs the same forward: without this Dynamo would give up on it after some."""
    torch._dynamo.reset()
    reports.clear()


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float16) and not x.is_nested else x


def _golden(row: Row) -> Any:
    """The result in fp64; the result itself where a row has no wider type."""
    with torch.autocast("cpu", enabled=False):
        try:
            return Function(row.golden or row.run)(*pytree.tree_map(_wide, row.inputs))
        except (RuntimeError, NotImplementedError):
            return Function(row.run)(*row.inputs)


def _agree(row: Row, found: Any, fused: int) -> None:
    """Bit for bit where nothing was fused, within the contract otherwise; and of the same structure."""
    eager = Function(row.run)(*row.inputs)
    mine, structure = pytree.tree_flatten(found)
    theirs, wanted = pytree.tree_flatten(eager)
    assert structure == wanted
    for x, y, g in zip(mine, theirs, pytree.tree_leaves(_golden(row)), strict=True):
        if not isinstance(y, Tensor):
            assert (type(x), x) == (type(y), y)
            continue
        assert (x.dtype, x.shape, x.layout) == (y.dtype, y.shape, y.layout)
        if not fused or not y.is_floating_point():
            assert torch.equal(x, y)
            continue
        verdict = compare(g, y, x)
        assert verdict.ok, verdict


@pytest.mark.parametrize("row", [r for r in ROWS if r.words or r in NESTED], ids=lambda r: r.name)
def test_explain_says_what_becomes_of_it(row: Row) -> None:
    report = attnopt.explain(Function(row.run), row.inputs)
    assert report.fused == row.fused, str(report)
    _explained(row, report)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_optimize_passes_it_through(row: Row) -> None:
    fast = attnopt.optimize(Function(row.run), row.inputs)
    assert fast.report.fused == row.fused, str(fast.report)
    _explained(row, fast.report)
    _agree(row, fast(*row.inputs), row.fused)


def _explained(row: Row, report: attnopt.Report) -> None:
    if row.words:
        assert any(row.words in text for text in (*report.notes, *(s.reason for s in report.sites)))
    assert not any("could not be" in s.reason or "validation failed" in s.reason for s in report.sites)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_the_backend_passes_it_through(row: Row) -> None:
    fast = torch.compile(Function(row.run), backend="attnopt", options={"rest": "eager"})
    _agree(row, fast(*row.inputs), sum(report.fused for report in reports))
    assert not any("could not be" in s.reason for report in reports for s in report.sites)


GRADIENTS = [row for row in NESTED if row.name not in ("no_grad", "while_loop", "gradient_inside")]


@pytest.mark.parametrize("door", ["optimize", "compile"])
@pytest.mark.parametrize("row", GRADIENTS, ids=lambda r: r.name)
def test_gradients_pass_through_nested_graphs(row: Row, door: str) -> None:
    model = Function(row.run)
    if door == "optimize":
        fast = attnopt.optimize(model, row.inputs)
    else:
        fast = torch.compile(model, backend="attnopt", options={"rest": "eager"})

    def gradients(run: Any, inputs: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        run(*leaves).square().sum().backward()
        return [x.grad for x in leaves]  # type: ignore[misc]

    wide = Function(row.golden or row.run)
    # The operator's backward starts from rounded outputs, which moves a gradient as rounded inputs would.
    golden, moved = (gradients(wide, [nudge(x, n, seed=1) for x in row.inputs]) for n in (0.0, 4.0))
    for g, m, e, k in zip(golden, moved, gradients(model, row.inputs), gradients(fast, row.inputs), strict=True):
        verdict = compare(g, e, k, gradients=True, nudged=(m,))
        assert verdict.ok, verdict


# --- functions with a gradient of their own ---------------------------------------------------------


class Reversed(torch.autograd.Function):
    """Identity whose gradient is turned around."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("door", ["optimize", "compile"])
def test_a_function_keeps_its_own_gradient(door: str, training: bool) -> None:
    model = Function(lambda q, k, v: attend(Reversed.apply(q), k, v)).train(training)
    if door == "optimize":
        fast = attnopt.optimize(model, QKV)
        assert fast.report.fused == 1
        assert any("Reversed" in note for note in fast.report.notes)
    else:
        fast = torch.compile(model, backend="attnopt", options={"rest": "eager"})

    def gradient(run: Any) -> Tensor:
        x = QKV[0].clone().requires_grad_()
        run(x, *QKV[1:]).square().sum().backward()
        return x.grad  # type: ignore[return-value]

    torch.testing.assert_close(gradient(fast), gradient(model))
    torch.testing.assert_close(fast(*QKV), model(*QKV))
