"""Reading around a softmax: what is declined, sinks in further columns, weights that are used elsewhere.

Every form that is read stands in `tests/spellings`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.errors import Decline
from attnopt.patterns import find
from attnopt.region import Region
from tests.modules import Function, captured

INPUTS = tuple(torch.randn(2, 4, n, 8, generator=torch.Generator().manual_seed(n + i)) for i, n in enumerate((7, 9, 9)))
CHANGED = "the weights are changed between the softmax and the values"
NONE = "no contraction of queries and keys makes the scores"
Run = Callable[..., Tensor]


def _found(run: Run, *inputs: Tensor) -> list[Region | Decline]:
    return [result for _, _, result in find(captured(run, *inputs).gm.graph)]


DECLINES: tuple[tuple[str, Run, str], ...] = (
    ("scores_only", lambda q, k, v: torch.softmax(q * k.mean(), -1) @ q.mT, NONE),
    ("over_queries", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "the softmax does not run over the keys"),
    ("shifted", lambda q, k, v: ((q @ k.mT).softmax(-1) + 0.1) @ v, CHANGED),
    ("clamped", lambda q, k, v: (q @ k.mT).softmax(-1).clamp(0.1) @ v, CHANGED),
    ("nan_becomes_one", lambda q, k, v: (q @ k.mT).softmax(-1).nan_to_num(1.0) @ v, CHANGED),
    ("identity_added", lambda q, k, v: ((q @ k.mT).softmax(-1) + torch.eye(7, 9)) @ v, CHANGED),
    ("heads_mixed_after", lambda q, k, v: torch.einsum("hg,bgqk->bhqk", q[0, :, :4, 0], (q @ k.mT).softmax(-1)) @ v, ""),
    ("heads_mixed_before", lambda q, k, v: torch.einsum("hg,bgqk->bhqk", q[0, :, :4, 0], q @ k.mT).softmax(-1) @ v, NONE),
    ("by_a_linear_map", lambda q, k, v: torch.nn.functional.linear(q[0, 0], k[0, 0]).softmax(-1) @ v[0, 0], NONE),
    ("keys_of_two_dimensions", lambda q, k, v: torch.einsum("bhqxy,bhxyd->bhqd", (q @ k.mT).softmax(-1).view(2, 4, 7, 3, 3), v.view(2, 4, 3, 3, 8)), "the contraction that applies the weights has a form that is not known"),
    ("many_columns", lambda q, k, v: torch.cat((q @ k.mT, q @ k.mT), -1).softmax(-1)[..., :9] @ v, "the softmax runs over more than the keys whose values are summed"),
    ("column_of_scores", lambda q, k, v: (q @ k.mT).softmax(-1)[..., :-1] @ v[..., :-1, :], "the softmax runs over more than the keys whose values are summed"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "run", "reason"), DECLINES, ids=[name for name, _, _ in DECLINES])
def test_declined_with_a_reason(name: str, run: Run, reason: str) -> None:
    (found,) = _found(run, *INPUTS)
    assert isinstance(found, Decline)
    assert found.reason.startswith(reason)
    assert found.node is not None


def test_a_softmax_without_a_contraction_is_no_site() -> None:
    assert _found(lambda x: torch.softmax(x, -1) * 2, torch.randn(3, 4)) == []


def test_weights_that_are_also_returned_do_not_lose_the_site() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights.mean(1)

    fast = attnopt.optimize(Function(run), INPUTS)
    assert fast.report.fused == 1
    for a, b in zip(fast(*INPUTS), run(*INPUTS), strict=True):
        torch.testing.assert_close(a, b)


def _dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.dropout((q @ k.mT).softmax(-1), 0.25, True) @ v


def test_dropout_has_the_mean_and_the_deviation_of_the_source() -> None:
    runs = 300
    fast = attnopt.optimize(Function(_dropped), INPUTS, strict=True, options={"kernel": "reference"})
    assert fast.report.sites[0].spec.dropout == 0.25
    torch.manual_seed(2)
    ours, theirs = (torch.stack([run(*INPUTS) for _ in range(runs)]) for run in (fast, _dropped))
    exact = (INPUTS[0] @ INPUTS[1].mT).softmax(-1) @ INPUTS[2]
    # Errors of the mean, in standard errors, have the deviation 1; there are 56 independent rows. Deviations, averaged
    # over them, agree to a few times 1/sqrt(2 * 300 * 56).
    errors = (ours.mean(0) - exact) / (ours.std(0) / runs**0.5)
    assert float(errors.square().mean().sqrt()) < 1.5
    torch.testing.assert_close(ours.std(0).mean(), theirs.std(0).mean(), rtol=0.05, atol=0.0)


def test_the_gradient_of_dropout_is_that_of_its_mask() -> None:
    inputs = [x.double().requires_grad_() for x in INPUTS]
    fast = attnopt.optimize(Function(_dropped), tuple(x.detach() for x in inputs), validate=False)

    def run(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fast(*given).sum()

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_weights_that_are_used_after_dropout_are_left_alone() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.dropout((q @ k.mT).softmax(-1), 0.25, True)
        return weights @ v, weights

    (found,) = [result for _, _, result in find(captured(run, *INPUTS).gm.graph)]
    assert isinstance(found, Decline)
    assert "after dropout" in found.reason


def test_a_masked_column_takes_no_weight() -> None:
    """A column of minus infinity beside the keys is no sink."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.pad(q @ k.mT, (0, 1), value=float("-inf")).softmax(-1)[..., :-1] @ v

    (found,) = _found(run, *INPUTS)
    assert isinstance(found, Region)
    assert str(found.spec) == "4 heads, d=8; score s"


def test_several_columns_are_one_sink() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.pad(q @ k.mT, (2, 1)).softmax(-1)[..., 2:-1] @ v

    (found,) = _found(run, *INPUTS)
    assert isinstance(found, Region)
    assert str(found.spec) == "4 heads, d=8; score s; sink log(3)"
    torch.testing.assert_close(attnopt.optimize(Function(run), INPUTS)(*INPUTS), run(*INPUTS))


def test_a_column_may_depend_on_the_query() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat((q @ k.mT, q[..., :1]), -1).softmax(-1)[..., :-1] @ v

    (found,) = _found(run, *INPUTS)
    assert isinstance(found, Region)
    assert str(found.spec) == "4 heads, d=8; score s; sink bias[b, h, q]"
    fast = attnopt.optimize(Function(run), INPUTS, options={"kernel": "reference"})
    torch.testing.assert_close(fast(*INPUTS), run(*INPUTS))
