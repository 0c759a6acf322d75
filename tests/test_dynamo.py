"""The backend: by entry point, its options, models that export refuses."""

from __future__ import annotations

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
