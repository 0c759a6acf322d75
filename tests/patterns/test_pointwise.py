"""Attention without a softmax is read as a pointwise spec; what only looks like it is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.capture import capture
from attnopt.dynamo import _Collecting
from attnopt.errors import Decline
from attnopt.patterns import find
from tests.forms import POINTWISE, QKV, Form, by_sum, check, numbers, scores
from tests.modules import Function


@pytest.mark.parametrize("row", POINTWISE, ids=lambda r: r.name)
def test_form_is_read_and_computed(row: Form) -> None:
    check(row)


class _Block(nn.Module):
    """Two linear maps of the input around `run`."""

    def __init__(self, run: object, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, width, bias=False) for _ in range(3))
        self.table = nn.Parameter(numbers(5, 8))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)  # type: ignore[operator]


NEAR_MISSES = (
    ("mlp_of_parameters", lambda m, x: (x @ m.a.weight).relu() @ m.b.weight),
    ("mlp_of_linears", lambda m, x: F.linear(F.relu(F.linear(x, m.a.weight)), m.b.weight)),
    ("memory_of_parameters", lambda m, x: (x @ m.table.mT).relu() @ m.table),
    (
        "keys_made_of_parameters",
        lambda m, x: (x @ F.linear(m.table, m.a.weight).mT).relu() @ F.linear(m.table, m.b.weight),
    ),
    ("gated_pooling", lambda m, x: (x @ m.a.weight).sigmoid().mT @ x),
    ("lora", lambda m, x: F.linear(x, m.a.weight) + (x @ m.b.weight[:, :2]) @ m.c.weight[:2]),
    ("channels", lambda m, x: (m.a(x).mT @ m.b(x)).sigmoid() @ m.c(x).mT),
    ("plain_chain", lambda m, x: (m.a(x) @ m.b(x).mT / 3) @ m.c(x)),
    ("chain_with_temperature", lambda m, x: (m.a(x) @ m.b(x).mT * x.mean((1, 2), keepdim=True)) @ m.c(x)),
)


@pytest.mark.parametrize(("name", "run"), NEAR_MISSES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_attention_is_no_site(name: str, run: object) -> None:
    x = numbers(2, 9, 8)
    found = find(capture(_Block(run), (x,), {}).gm.graph)
    assert found == []


def test_the_same_with_activations_is_a_site() -> None:
    run = lambda m, x: (m.a(x) @ m.b(x).mT).relu() @ m.c(x)  # noqa: E731
    fast = attnopt.optimize(_Block(run), (numbers(2, 9, 8),), options=attnopt.Options(kernel="reference"))
    assert [s.form for s in fast.report.sites] == ["relu"]


W = numbers(4, 7, 9)
DECLINED = (
    (
        "columns_too",
        lambda q, k, v: (w := scores(q, k).sigmoid()) / w.sum(-2, keepdim=True) @ v,
        "also summed over the queries",
    ),
    (
        "another_sum",
        lambda q, k, v: (w := scores(q, k).sigmoid()) / w.square().sum(-1, keepdim=True) @ v,
        "a sum of something else",
    ),
    ("masked_after", lambda q, k, v: (by_sum(scores(q, k).sigmoid()) * (W > 0)) @ v, "a sum over other keys"),
    ("two_norms", lambda q, k, v: F.normalize(scores(q, k), dim=-1) @ v, "another norm than the sum"),
    ("compared", lambda q, k, v: ((s := scores(q, k)) * (s > 0.5)) @ v, "computed from the scores"),
    ("twice", lambda q, k, v: by_sum(by_sum(scores(q, k).sigmoid()) + 1) @ v, "normalised more than once"),
)


@pytest.mark.parametrize(("name", "run", "reason"), DECLINED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_expressed_is_declined(name: str, run: object, reason: str) -> None:
    found = find(capture(Function(run), QKV, {}).gm.graph)
    assert len(found) == 1
    assert isinstance(found[0][2], Decline), str(found[0][2])
    assert reason in found[0][2].reason


def test_a_divisor_without_gradient_is_no_sum_of_the_weights() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = scores(q, k).relu()
        return w / w.sum(-1, keepdim=True).detach().clamp(min=1) @ v

    fast = attnopt.optimize(Function(run), QKV, options=attnopt.Options(kernel="reference"))
    assert [s.status for s in fast.report.sites] == ["declined"]
    torch.testing.assert_close(fast(*QKV), run(*QKV), rtol=0, atol=0)


def test_extreme_scores_have_finite_gradients() -> None:
    inputs = tuple(8 * x for x in QKV[:2]) + QKV[2:]
    for row in (POINTWISE[0], next(r for r in POINTWISE if r.name == "softplus_normalised")):
        check(Form(row.name, row.run, row.spec, row.form, inputs))


def test_parameters_are_known_as_such_under_dynamo() -> None:
    backend = _Collecting("eager", attnopt.Options())
    model, x = _Block(NEAR_MISSES[0][1]), numbers(1, 9, 8)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert [report.sites for report in backend.reports] == [()]
