"""Every spelling is recognised as the expected spec, computes the same, and has the same gradients."""

from __future__ import annotations

import pytest
import torch

import attnopt
from attnopt.capture import capture
from attnopt.errors import Decline
from attnopt.patterns import find
from attnopt.region import Region
from attnopt.runtime.validate import compare
from tests.spellings import SPELLINGS, Spelling


class Model(torch.nn.Module):
    """A function as a module."""

    def __init__(self, run: object) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(*inputs)  # type: ignore[operator]


def _inputs(spelling: Spelling) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(hash(spelling.shapes) % 1000)
    return [torch.randn(shape, generator=generator) for shape in spelling.shapes] + list(spelling.extra)


def _double(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling_is_recognised(spelling: Spelling) -> None:
    captured = capture(Model(spelling.run), tuple(_inputs(spelling)), {})
    found = find(captured.gm.graph, captured.scalars)
    assert len(found) == 1, f"expected one site, found {[str(f[2]) for f in found]}"
    region = found[0][2]
    assert isinstance(region, Region), str(region)
    assert str(region.spec) == spelling.spec
    region.spec.verify()


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling_computes_the_same(spelling: Spelling) -> None:
    inputs = _inputs(spelling)
    model = Model(spelling.run)
    fast = attnopt.optimize(model, tuple(inputs), strict=True)
    assert fast.report.fused == 1
    verdict = compare(model(*_double(inputs)), model(*inputs), fast(*inputs))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling_has_the_same_gradients(spelling: Spelling) -> None:
    inputs = _inputs(spelling)
    model = Model(spelling.run)
    fast = attnopt.optimize(model, tuple(inputs), validate=False)
    weight = torch.randn(model(*inputs).shape, generator=torch.Generator().manual_seed(5))

    if "uniform" in spelling.spec and spelling.extra:
        # A row whose finite mask absorbs every score is constant: its gradient is zero here, while autograd of
        # the addition passes one through. Only rows with a kept key are compared.
        weight[1:] = 0

    def gradients(run: torch.nn.Module, given: list[torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() if i < 3 else x for i, x in enumerate(given)]
        out = run(*leaves)
        rows = out.isfinite().all(-1, keepdim=True)
        (out.where(rows, 0.0) * weight.to(out.dtype)).sum().backward()
        return [x.grad for x in leaves[:3]]

    golden, eager, kernel = gradients(model, _double(inputs)), gradients(model, inputs), gradients(fast, inputs)
    for g, e, k in zip(golden, eager, kernel, strict=True):
        verdict = compare(g, e, k, gradients=True)
        assert verdict.ok, verdict.reason


DECLINES = (
    (
        "scores_only",
        lambda q, k, v: torch.softmax(q * k.mean(), -1) @ q.mT,
        "no contraction of queries and keys makes the scores",
    ),
    ("softmax_over_queries", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "the softmax does not run over the keys"),
    (
        "weights_changed",
        lambda q, k, v: ((q @ k.mT).softmax(-1) * torch.arange(9.0)) @ v,
        "the weights are changed between the softmax and the values",
    ),
)


@pytest.mark.parametrize(("name", "run", "reason"), DECLINES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_softmax_attention_is_declined_with_a_reason(name: str, run: object, reason: str) -> None:
    inputs = (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8))
    found = find(capture(Model(run), inputs, {}).gm.graph)
    assert len(found) == 1
    assert isinstance(found[0][2], Decline)
    assert found[0][2].reason == reason
    assert found[0][2].node is not None


def test_a_softmax_without_a_contraction_is_no_site() -> None:
    assert find(capture(Model(lambda x: torch.softmax(x, -1) * 2), (torch.randn(3, 4),), {}).gm.graph) == []


def test_weights_that_are_also_returned_do_not_lose_the_site() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights.mean(1)

    inputs = (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8))
    fast = attnopt.optimize(Model(run), inputs)
    assert fast.report.fused == 1
    for a, b in zip(fast(*inputs), run(*inputs), strict=True):
        torch.testing.assert_close(a, b)
