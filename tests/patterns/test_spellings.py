"""Every spelling is read as the expected specs, computes the same, and has the same gradients."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.capture import capture
from attnopt.patterns import find
from attnopt.patterns.known import Known
from attnopt.region import Region
from attnopt.runtime.validate import compare
from tests.modules import Function
from tests.spellings import GROUPS, SPELLINGS, Spelling

# At least so many forms are read; a row is never dropped to make a test pass.
LEAST = 150


def _model(row: Spelling, double: bool = False) -> nn.Module:
    run = copy.deepcopy(row.run).double() if double and isinstance(row.run, nn.Module) else row.run
    return Function(run).train(row.training)


def _inputs(row: Spelling, double: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(row.name))
    made = [torch.randn(shape, generator=generator) for shape in row.shapes] + list(row.extra)
    return [x.double() if double and x.is_floating_point() else x for x in made]


def _run(model: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Floating outputs, and the gradients of all floating inputs and parameters at a fixed random direction."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    found = model(*leaves)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None and x.is_floating_point()]
    total = sum((_direction(x, i) * _rows(x)).sum() for i, x in enumerate(outputs))
    wanted = [x for x in (*leaves, *model.parameters()) if x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(total, wanted, allow_unused=True))  # type: ignore[arg-type]


def _direction(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x.dtype)


def _rows(x: Tensor) -> Tensor:
    """The output with rows that are not finite as zeros: their gradient is NaN wherever it reaches."""
    return x.where(x.isfinite().all(-1, keepdim=True), 0.0)


@lru_cache(maxsize=1)
def _source(row: Spelling) -> tuple[Any, Any]:
    """The source in fp64 and in fp32."""
    return _run(_model(row, double=True), _inputs(row, double=True)), _run(_model(row), _inputs(row))


@pytest.mark.parametrize("row", SPELLINGS, ids=lambda row: row.name)
def test_it_is_read_as_its_spec(row: Spelling) -> None:
    model = _model(row)
    captured = capture(model, tuple(_inputs(row)), {})
    found = find(captured.gm.graph, Known(captured.scalars, captured.tables(model)))
    assert tuple(str(f[2].spec) if isinstance(f[2], Region) else f"declined: {f[2]}" for f in found) == row.specs


@pytest.mark.parametrize("row", SPELLINGS, ids=lambda row: row.name)
def test_it_computes_the_same_with_the_same_gradients(row: Spelling) -> None:
    golden, eager = _source(row)
    fast = attnopt.optimize(_model(row), tuple(_inputs(row)), strict=True, options={"kernel": row.kernel})
    assert fast.report.fused == len(row.specs), str(fast.report)
    found = _run(fast, _inputs(row))
    for place, (g, e, k) in enumerate(zip(golden[0], eager[0], found[0], strict=True)):
        verdict = compare(g, e, k)
        assert verdict.ok, f"output {place}: {verdict.reason}"
    for place, (g, e, k) in enumerate(zip(golden[1], eager[1], found[1], strict=True)):
        assert (g is None) == (k is None), f"gradient {place} is {'not' if g is None else 'only'} there in fp64"
        if g is not None and e is not None and k is not None:
            verdict = compare(g, e, k, gradients=True)
            assert verdict.ok, f"gradient {place}: {verdict.reason}"


def test_names_are_distinct_and_the_matrix_is_large() -> None:
    names = [row.name for row in SPELLINGS]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
    assert len(names) >= LEAST
    assert all(len(group.ROWS) >= 5 for group in GROUPS)
