"""The operator that makes column mass and weights: what it returns, traces, differentiates and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attnopt.errors import ShapeError
from attnopt.options import Options
from attnopt.returns import AGAIN
from attnopt.runtime.dispatch import use
from attnopt.runtime.pairs import defined
from attnopt.runtime.reference import reference
from attnopt.runtime.side import OPERATOR, side
from attnopt.spec import AttentionSpec
from tests.runtime.cases import CAUSAL, PLAIN, inputs


def known(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from dataclasses import replace

    return reference(replace(spec, returns=AGAIN), q, k, v)[1].float()


@pytest.fixture(autouse=True)
def _reference_only() -> object:
    with use(Options(kernel="reference")) as dispatcher:
        yield dispatcher


@pytest.mark.parametrize("name", ["column_mass", "weights"])
def test_it_is_the_definition_in_the_promised_dtype(name: str) -> None:
    q, k, v = inputs(CAUSAL, dtype=torch.bfloat16)
    found = side(CAUSAL, name, q, k, known(CAUSAL, q, k, v))
    assert found.dtype == (torch.bfloat16 if name == "weights" else torch.float32)
    assert_close(found.double(), defined(CAUSAL, q.double(), k.double(), (), (), name), atol=0.02, rtol=0.02)


def test_torch_accepts_the_operator() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(PLAIN, 1))
    rows = known(PLAIN, q, k, v).detach()
    torch.library.opcheck(OPERATOR, (q, k, rows, [], [], PLAIN.text, "weights"))


def test_gradients_reach_queries_and_keys() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(CAUSAL, 1))
    found = side(CAUSAL, "column_mass", q, k, known(CAUSAL, q, k, v))
    grads = torch.autograd.grad((found**2).sum(), [q, k])
    want = torch.autograd.grad((defined(CAUSAL, q, k, (), (), "column_mass") ** 2).sum(), [q, k])
    assert_close(grads, want)


def test_mapped_and_cast() -> None:
    q, k, v = inputs(PLAIN, 1)
    rows = known(PLAIN, q, k, v)
    many = torch.vmap(lambda x: side(PLAIN, "weights", x, k, rows))(torch.stack([q, 2 * q]))
    assert_close(many[0], side(PLAIN, "weights", q, k, rows))
    with torch.autocast("cpu", torch.bfloat16):
        assert side(PLAIN, "weights", q, k, rows).dtype == torch.bfloat16


def test_a_name_or_a_shape_that_does_not_fit_is_refused() -> None:
    q, k, v = inputs(PLAIN)
    rows = known(PLAIN, q, k, v)
    with pytest.raises(ShapeError, match="no side output"):
        side(PLAIN, "entropy", q, k, rows)
    with pytest.raises(ShapeError, match="k must have the shape"):
        side(PLAIN, "weights", q, k[:, :1], rows)


@pytest.mark.parametrize("name", ["column_mass", "weights"])
def test_derivatives_by_transforms_are_those_of_the_definition(name: str) -> None:
    q, k, v = (t.double() for t in inputs(CAUSAL))
    rows, along = known(CAUSAL, q, k, v), torch.ones_like(q)
    made, tangent = torch.func.jvp(lambda x: side(CAUSAL, name, x, k, rows), (q,), (along,))
    golden, expected = torch.func.jvp(lambda x: defined(CAUSAL, x, k, (), (), name), (q,), (along,))
    assert expected.abs().max() > 1e-3
    assert_close(tangent, expected.to(made.dtype))
    assert_close(made, golden.to(made.dtype))
    found = torch.func.grad(lambda x: side(CAUSAL, name, x, k, rows).square().sum())(q)
    expected = torch.func.grad(lambda x: defined(CAUSAL, x, k, (), (), name).square().sum())(q)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
