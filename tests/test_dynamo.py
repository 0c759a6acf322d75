"""The backend: by entry point, its options, models that export refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnopt
from attnopt import dynamo
from attnopt.errors import CaptureError, OptionError
from tests.modules import Function, SelfAttention

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    dynamo.reports.clear()


def test_a_compiled_model_is_fused() -> None:
    model = SelfAttention().eval()
    fast = torch.compile(model, backend=dynamo.attnopt_backend, options={"rest": "eager"})
    torch.testing.assert_close(fast(X), model(X))
    assert [r.fused for r in dynamo.reports] == [1]


@pytest.mark.parametrize(
    "given", [{"options": {"rest": "jit"}}, {"options": {"kernl": "cpp"}}, {"mode": "reduce-overhead"}], ids=str
)
def test_misuse_is_an_option_error(given: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        dynamo.attnopt_backend(torch.fx.symbolic_trace(torch.nn.Identity()), [X], **given)  # type: ignore[arg-type]


def test_graph_breaks_are_no_obstacle() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = (x @ x.mT).softmax(-1) @ x
        if y.sum().item() > 1e9:
            y = y + 1
        return y * 2

    fast = attnopt.optimize(Function(run), (X,))
    torch.testing.assert_close(fast(X), run(X))
    assert fast.report.fused == 1
    assert attnopt.explain(Function(run), (X,)).fused == 1


def test_a_graph_that_cannot_be_traced_says_so() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.matmul, (x, x)),))
    with pytest.raises(CaptureError, match="could not be traced"):
        dynamo.retrace(torch.fx.GraphModule(torch.nn.Module(), graph), [X])


def test_what_is_written_to_data_is_not_lost() -> None:
    """`.data` is no call that a tracer sees; CogVideoX fills its position embedding through it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.data[:, 1:].copy_(x[:, :1].expand(-1, 3, -1))
        return (y @ y.mT).softmax(-1) @ y

    model, x = Function(run), torch.randn(2, 4, 8)
    fast = attnopt.optimize(model, (x,))
    torch.testing.assert_close(fast(x), model(x))
    assert "changed in place" in fast.report.sites[0].reason


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def _compiled(run: Callable[..., Any], **more: Any) -> Any:
    return torch.compile(Function(run), backend="attnopt", options={"rest": "eager", "kernel": "reference"}, **more)


@pytest.mark.parametrize("dynamic", [True, None])
def test_sizes_that_change_are_no_error(dynamic: bool | None) -> None:
    """One graph serves all of them, its heads and widths fixed, and what a mask loads is as long as the keys are."""
    fast = _compiled(_attend, dynamic=dynamic)
    draw = torch.Generator().manual_seed(0)
    for batch, n_q, n_k in ((2, 5, 7), (3, 6, 9), (4, 8, 8), (5, 3, 11), (6, 9, 4)):
        q, k, v = (torch.randn(batch, 4, n, 8, generator=draw) for n in (n_q, n_k, n_k))
        keep = torch.rand(batch, 1, 1, n_k, generator=draw) > 0.3
        keep[..., 0] = True
        torch.testing.assert_close(fast(q, k, v, keep), _attend(q, k, v, keep))
    assert [report.fused for report in dynamo.reports] == [1] * len(dynamo.reports)
    assert len(dynamo.reports) <= 2


def test_compiling_writes_to_no_input() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        v.add_(1)
        return out

    q, k, v = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    expected, before = (q @ k.mT).softmax(-1) @ v, v.clone()
    torch.testing.assert_close(_compiled(run)(q, k, v), expected)
    torch.testing.assert_close(v, before + 1)


def test_weights_without_gradient_stay_without() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weights = (q @ k.mT).softmax(-1)
        return weights @ v

    inputs = [torch.randn(2, 4, 5, 8).requires_grad_() for _ in range(3)]
    found = torch.autograd.grad(_compiled(run)(*inputs).sum(), inputs, allow_unused=True)
    assert found[0] is None
    assert found[1] is None
    torch.testing.assert_close(found[2], torch.autograd.grad(run(*inputs).sum(), inputs[2])[0])
    assert [report.fused for report in dynamo.reports] == [0]
