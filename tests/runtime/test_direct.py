"""Calls go past the dispatcher where nobody looks on, and nowhere else; both ways give the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.runtime.direct import direct
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from tests.runtime.cases import PLAIN, inputs

X = torch.randn(3, generator=torch.Generator().manual_seed(0))


class Own(Tensor):
    """A subclass, which may mean anything by its operators."""


def negated(t: Tensor) -> Tensor:
    """Equal to `t`, in memory that holds its negation."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def test_plain_tensors() -> None:
    held = torch.nn.Parameter(X.clone())
    assert direct((X, X))
    assert not direct((X, held))
    with torch.no_grad():
        assert direct((X, held))
    with torch.inference_mode():
        assert direct((X, held, X + 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: X.as_subclass(Own),
        lambda: negated(X),
        lambda: torch._efficientzerotensor(3),
        lambda: X.to_sparse(),
        lambda: X.to("meta"),
        lambda: FakeTensorMode().from_tensor(X),
    ],
    ids=["subclass", "negated", "zero", "sparse", "meta", "fake"],
)
def test_tensors_that_are_not_what_they_seem(make: Callable[[], Tensor]) -> None:
    assert not direct((X, make()))


@pytest.mark.parametrize(
    "enter",
    [
        TorchDispatchMode,
        lambda: torch.device("cpu"),
        lambda: torch.autocast("cpu"),
        lambda: profile(acc_events=True),
        forward_ad.dual_level,
    ],
    ids=["dispatch mode", "function mode", "autocast", "profiler", "forward mode"],
)
def test_where_somebody_looks_on(enter: Callable[[], AbstractContextManager[object]]) -> None:
    with enter():
        assert not direct((X,))
    with contextlib.nullcontext():
        assert direct((X,))


def test_under_tracers_and_transforms() -> None:
    seen: list[bool] = []

    def run(x: Tensor) -> Tensor:
        seen.append(direct((x,)))
        return x * 2

    torch.func.vmap(run)(X[None])
    torch.jit.trace(run, X, check_trace=False)
    make_fx(run)(X)
    torch.compile(run, backend="eager")(X)
    assert seen
    assert not any(seen)


def test_a_profile_names_the_operator() -> None:
    with profile(acc_events=True) as found:
        attention(PLAIN, *inputs(PLAIN))
    assert "attnopt::attention" in {event.name for event in found.events()}


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_negated_views(which: int, records: bool) -> None:
    given = list(inputs(PLAIN))
    want = reference(PLAIN, *given)[0]
    given[which] = negated(given[which])
    given[0].requires_grad_(records)
    out = attention(PLAIN, *given)[0]
    assert_close(out, want)
    if records:
        assert torch.isfinite(torch.autograd.grad(out.sum(), given[0])[0]).all()
