"""The short way into the operator gives what the long way gives: values, gradients, traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.runtime import dispatch
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, EmptyRow
from tests.runtime.cases import BIASED, PLAIN, inputs

UNIFORM = replace(PLAIN, keep=sp.Lt(ex.q, ex.k), empty_row=EmptyRow.UNIFORM)
BIAS = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3))


def test_gradients_of_all_inputs_and_captures() -> None:
    leaves = [t.requires_grad_() for t in (*inputs(BIASED), BIAS.clone())]
    out, lse = attention(BIASED, *leaves[:3], [leaves[3]])
    got = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    out, lse = reference(BIASED, *leaves[:3], [leaves[3]])
    want = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_input_that_needs_a_gradient_is_enough(which: int) -> None:
    given = list(inputs(PLAIN))
    given[which].requires_grad_()
    out, _ = attention(PLAIN, *given)
    assert out.requires_grad
    assert torch.autograd.grad(out.sum(), given[which])[0].shape == given[which].shape


def test_nothing_is_recorded_where_nothing_is_needed() -> None:
    q, k, v = inputs(PLAIN)
    assert not attention(PLAIN, q, k, v)[0].requires_grad
    with torch.no_grad():
        assert not attention(PLAIN, q.requires_grad_(), k, v)[0].requires_grad
    with torch.inference_mode():
        assert attention(PLAIN, q, k, v)[0].is_inference()


@pytest.mark.parametrize("needs", [False, True])
def test_a_trace_holds_the_operator(needs: bool) -> None:
    q, k, v = inputs(PLAIN)
    graph = make_fx(lambda q, k, v: attention(PLAIN, q, k, v)[0])(q.requires_grad_(needs), k, v)
    assert torch.ops.attnopt.attention.default in {node.target for node in graph.graph.nodes}
    assert_close(graph(q, k, v), attention(PLAIN, q, k, v)[0])


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(PLAIN))
    (first,) = torch.autograd.grad(attention(PLAIN, q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(AttnoptError, match="second derivative"):
        first.sum().backward()


def _dual(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.filterwarnings("ignore:forward-mode derivatives")
@pytest.mark.parametrize("spec", [PLAIN, BIASED, UNIFORM], ids=["plain", "biased", "uniform"])
@pytest.mark.parametrize(
    "derive",
    [
        _dual,
        lambda run, x, t: torch.func.jvp(run, (x,), (t,))[1],
        lambda run, x, t: torch.func.vjp(run, x)[1](run(x))[0],
        lambda run, x, t: torch.func.vmap(torch.func.grad(lambda y: run(y).square().sum()))(x[None]),
        lambda run, x, t: torch.func.jvp(torch.func.grad(lambda y: run(y).square().sum()), (x,), (t,))[1],
    ],
    ids=["dual", "jvp", "vjp", "vmap of grad", "forward over reverse"],
)
def test_derivatives_that_kernels_do_not_have(derive: Callable[..., torch.Tensor], spec: AttentionSpec) -> None:
    q, k, v = inputs(spec)
    captures = [BIAS] if spec.captures else []
    want = derive(lambda x: reference(spec, x, k, v, captures)[0], q, q.sin())
    got = derive(lambda x: attention(spec, x, k, v, captures)[0], q, q.sin())
    assert want.abs().max() > 0
    assert_close(got, want)


def test_that_the_reference_takes_derivatives_is_said() -> None:
    q, k, v = inputs(PLAIN)
    with dispatch.use(Options.make({"fuel": 91})), pytest.warns(dispatch.AttnoptWarning, match=r"torch\.func"):
        torch.func.jvp(lambda x: attention(PLAIN, x, k, v)[0], (q,), (q,))
