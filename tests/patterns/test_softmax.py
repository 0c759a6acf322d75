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

INPUTS = (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8))
CHANGED = "the weights are changed between the softmax and the values"
Run = Callable[..., Tensor]


def _found(run: Run, *inputs: Tensor) -> list[Region | Decline]:
    return [result for _, _, result in find(captured(run, *inputs).gm.graph)]


DECLINES: tuple[tuple[str, Run, str], ...] = (
    ("scores_only", lambda q, k, v: torch.softmax(q * k.mean(), -1) @ q.mT, "no contraction of queries and keys makes the scores"),
    ("over_queries", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "the softmax does not run over the keys"),
    ("shifted", lambda q, k, v: ((q @ k.mT).softmax(-1) + 0.1) @ v, CHANGED),
    ("clamped", lambda q, k, v: (q @ k.mT).softmax(-1).clamp(0.1) @ v, CHANGED),
    ("nan_becomes_one", lambda q, k, v: (q @ k.mT).softmax(-1).nan_to_num(1.0) @ v, CHANGED),
    ("many_columns", lambda q, k, v: torch.cat((q @ k.mT, q @ k.mT), -1).softmax(-1)[..., :9] @ v, "the softmax runs over more than the keys whose values are summed"),
    ("column_by_query", lambda q, k, v: torch.cat((q @ k.mT, q[..., :1]), -1).softmax(-1)[..., :-1] @ v, ""),
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


def test_a_column_that_depends_on_the_query_cannot_be_a_sink() -> None:
    (found,) = _found(dict((n, r) for n, r, _ in DECLINES)["column_by_query"], *INPUTS)
    assert "cannot be expressed" in str(found)
