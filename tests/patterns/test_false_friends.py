"""What looks like attention and is not stays as it is, for the right reason: outputs and gradients unchanged."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnopt
from attnopt.runtime.validate import compare
from tests.chunk_friends import CHUNKED
from tests.false_friends import FRIENDS as LOOKALIKES
from tests.false_friends import Friend
from tests.modules import Function
from tests.unsafe_graphs import UNSAFE

FRIENDS, SEED = (*LOOKALIKES, *UNSAFE, *CHUNKED), 11


def _copies(inputs: tuple[Tensor, ...], double: bool = False) -> list[Tensor]:
    """Fresh inputs of the same values, every floating one a leaf that gradients are asked of."""
    out = []
    for x in inputs:
        x = x.double() if double and x.dtype == torch.float32 else x
        out.append(x.detach().clone().requires_grad_(x.is_floating_point()))
    return out


def _leaves(results: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]


def _outcome(model: nn.Module, inputs: list[Tensor], backward: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, the inputs as they are left, and input gradients, with the random numbers of one seed."""
    torch.manual_seed(SEED)
    given = [x * 1 if x.requires_grad else x for x in inputs]
    results = _leaves(model(*given)) + [x.detach().clone() for x in given]
    torch.manual_seed(SEED + 1)
    total = sum((x * torch.randn(x.shape)).sum() for x in results if x.requires_grad)
    if backward and isinstance(total, Tensor):
        total.backward()
    return [x.detach() for x in results], [x.grad for x in inputs]


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x.nan_to_num(3.0), y.nan_to_num(3.0))


@pytest.mark.parametrize("validate", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("friend", FRIENDS, ids=lambda f: f.name)
def test_no_false_friend(friend: Friend, validate: bool) -> None:
    model = Function(friend.run).train()
    before = copy.deepcopy(model.state_dict())
    fast = attnopt.optimize(model, tuple(x.clone() for x in friend.inputs), validate=validate)
    sites = fast.report.sites
    declined = [s for s in sites if s.status == "declined"]
    assert fast.report.fused == friend.fused, str(fast.report)
    assert len(declined) == len(friend.reasons), str(fast.report)
    for site, words in zip(declined, friend.reasons, strict=True):
        assert re.search(words, site.reason), site.reason
        assert "could not be read" not in site.reason
        assert "validation failed" not in site.reason
    eager, kernel = (_outcome(run, _copies(friend.inputs), friend.backward) for run in (model, fast))
    if not friend.fused:
        for x, y in zip(eager[0] + eager[1], kernel[0] + kernel[1], strict=True):
            assert _same(x, y)
    else:
        _within_contract(friend, eager, kernel)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())


def _within_contract(friend: Friend, eager: Any, kernel: Any) -> None:
    golden = _outcome(Function(friend.golden or friend.run), _copies(friend.inputs, double=True), friend.backward)
    for gradients in (False, True):
        for g, e, k in zip(golden[gradients], eager[gradients], kernel[gradients], strict=True):
            if e is None or k is None:
                assert e is k
                continue
            verdict = compare(g, e, k, gradients=gradients)
            assert verdict.ok, verdict


def test_there_are_enough_of_them_and_their_names_differ() -> None:
    assert len(FRIENDS) >= 30
    assert len({f.name for f in FRIENDS}) == len(FRIENDS)
