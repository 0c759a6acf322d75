"""Every spelling is read as the expected specs, computes the same, and has the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.capture import capture
from attnopt.patterns import find
from attnopt.patterns.known import Known
from attnopt.region import Region
from attnopt.runtime.validate import compare, nudge
from tests.modules import Function
from tests.spellings import GROUPS, SPELLINGS, Spelling
from tests.spellings.row import K, Q

# At least so many forms are read; a row is never dropped to make a test pass.
LEAST = 260
# fp64 keeps 16 digits; a few hundred operations, and cancellation by a factor of a thousand, leave ten.
RELATIVE = 1e-10
# Read for every length at once.
DYNAMIC = (
    "einsum_ellipsis", "products_summed", "stable_by_hand_masked", "masked_exp", "renormalised", "log_softmax",
    "logsumexp", "softmax_plus_one_padded", "sink_first", "sink_by_exp", "guard_both", "guard_any",
)  # fmt: skip
KERNELS = [row for row in SPELLINGS if row.kernel != "reference"]


def _name(row: Spelling) -> str:
    return row.name


def _model(row: Spelling, double: bool = False) -> nn.Module:
    run = copy.deepcopy(row.run).double() if double and isinstance(row.run, nn.Module) else row.run
    return Function(run).train(row.training)


def _inputs(row: Spelling, double: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(row.name))
    made = [torch.randn(shape, generator=generator) for shape in row.shapes] + list(row.extra)
    return [x.double() if double and x.is_floating_point() else x for x in made]


def _run(model: nn.Module, inputs: list[Tensor], row: Spelling) -> tuple[list[Tensor], list[Tensor | None]]:
    """Floating outputs, and the gradients of all floating inputs and parameters at a fixed random direction."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point() and row.gradients) for x in inputs]
    found = model(*leaves)
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None and x.is_floating_point()]
    if not row.gradients:
        return outputs, []
    total = sum((_direction(x, row) * _rows(x)).sum() for x in outputs)
    wanted = [x for x in (*leaves, *model.parameters()) if x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(total, wanted, allow_unused=True))  # type: ignore[arg-type]


def _direction(x: Tensor, row: Spelling) -> Tensor:
    """A random direction.

    A row whose finite fill absorbs every score is constant: its gradient is zero here, while autograd of an addition
    passes one through. The matrix has such rows in the second batch entry, which is left out.
    """
    found = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(x.dtype)
    if any("uniform" in spec for spec in row.specs):
        found[1:] = 0
    return found


def _rows(x: Tensor) -> Tensor:
    """The output with rows that are not finite as zeros."""
    return x.where(x.isfinite().all(-1, keepdim=True), 0.0)


@pytest.mark.parametrize("row", SPELLINGS, ids=_name)
def test_it_is_read_as_its_spec(row: Spelling) -> None:
    model = _model(row)
    captured = capture(model, tuple(_inputs(row)), {})
    found = find(captured.gm.graph, Known(captured.scalars, captured.tables(model)))
    assert tuple(str(f[2].spec) if isinstance(f[2], Region) else f"declined: {f[2]}" for f in found) == row.specs


@pytest.mark.parametrize("row", SPELLINGS, ids=_name)
def test_its_mathematics_and_its_gradients_are_the_source_s(row: Spelling) -> None:
    """In fp64, where only another mathematics makes a difference. A gradient that is NaN in the source may be none."""
    inputs = _inputs(row, double=True)
    model = _model(row, double=True)
    fast = attnopt.optimize(model, tuple(inputs), strict=True, validate=False, options={"kernel": "reference"})
    assert fast.report.fused == len(row.specs), str(fast.report)
    golden, found = _run(model, inputs, row), _run(fast, inputs, row)
    for expected, seen in zip(golden[0], found[0], strict=True):
        torch.testing.assert_close(seen, expected, rtol=RELATIVE, atol=RELATIVE, equal_nan=True)
    for place, (expected, seen) in enumerate(zip(golden[1], found[1], strict=True)):  # type: ignore[assignment]
        if expected is None or seen is None:  # no gradient is a gradient of zeros
            assert all(x is None or not x.any() for x in (expected, seen)), f"gradient {place}"
            continue
        wanted, given = expected, seen
        real = wanted.isfinite()
        scale = float(wanted[real].abs().max()) if bool(real.any()) else 1.0
        torch.testing.assert_close(
            given[real], wanted[real], rtol=RELATIVE, atol=RELATIVE * max(scale, 1.0),
            msg=lambda m, n=place: f"gradient {n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("row", KERNELS, ids=_name)
def test_its_kernel_is_as_close_as_the_source(row: Spelling) -> None:
    """Outputs, and the gradients of what is no small parameter: a sum of few numbers may be exact by chance."""
    inputs = _inputs(row)
    model = _model(row)
    golden = _run(_model(row, double=True), _inputs(row, double=True), row)
    eager = _run(model, inputs, row)
    fast = attnopt.optimize(model, tuple(inputs), strict=True, options={"kernel": row.kernel})
    found = _run(fast, inputs, row)
    for g, e, k in zip(golden[0], eager[0], found[0], strict=True):
        verdict = compare(g, e, k)
        assert verdict.ok, verdict.reason
    # On a few dozen numbers eager may be lucky: what inputs a rounding away would give is allowed too.
    wide = _inputs(row, double=True)
    moved = [[nudge(x, 2.0, 7 * seed) if x.is_floating_point() else x for x in wide] for seed in (1, 2, 3)]
    nudged = [_run(_model(row, double=True), inputs, row)[1] for inputs in moved]
    for place, (g, e, k) in enumerate(zip(golden[1][: len(row.shapes)], eager[1], found[1], strict=False)):  # type: ignore[assignment]
        if g is not None and bool(g.isfinite().all()):
            others = [run[place] for run in nudged]
            verdict = compare(g, e, k, gradients=True, nudged=[x for x in others if x is not None])
            assert verdict.ok, verdict.reason


@pytest.mark.parametrize("name", DYNAMIC)
def test_lengths_may_vary(name: str) -> None:
    row = next(row for row in SPELLINGS if row.name == name)
    inputs = tuple(_inputs(row, double=True))
    marks = {Q: torch.export.Dim("n_q", min=2, max=64), K: torch.export.Dim("n_k", min=2, max=64)}
    shapes = tuple({i: marks[n] for i, n in enumerate(x.shape) if n in marks} or None for x in inputs)
    fast = attnopt.optimize(
        _model(row),
        inputs,
        dynamic_shapes={"args": shapes},
        strict=True,
        validate=False,
        options={"kernel": "reference"},
    )
    longer = [_longer(x) for x in inputs]
    torch.testing.assert_close(fast(*longer), row.run(*longer), rtol=RELATIVE, atol=RELATIVE, equal_nan=True)


def _longer(x: Tensor) -> Tensor:
    """The tensor with five queries more and three keys more."""
    for dim, size in enumerate(x.shape):
        if size in (Q, K):
            x = torch.cat((x, x.narrow(dim, 0, 5 if size == Q else 3)), dim)
    return x


def test_names_are_distinct_and_the_matrix_is_large() -> None:
    names = [row.name for row in SPELLINGS]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})
    assert len(names) >= LEAST
    assert all(len(group.ROWS) >= 5 for group in GROUPS)
