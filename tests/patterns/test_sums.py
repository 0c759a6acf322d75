"""Weights that are sums of softmaxes are one attention with terms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.capture import capture
from attnopt.errors import Decline
from attnopt.patterns import find
from tests.forms import QKV, Form, check, numbers
from tests.modules import Function

LAMBDA, BY_HEAD = torch.tensor(0.3), torch.tensor([0.2, 0.4]).view(2, 1, 1)
FLAT = (numbers(2, 9, 32), numbers(2, 9, 32, seed=1), numbers(2, 9, 32, seed=2))


def differential(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """DIFF Transformer: one softmax over twice the heads, seen as pairs."""
    q, k = (x.view(2, 9, 4, 8).transpose(1, 2) for x in (q, k))
    v = v.view(2, 9, 2, 16).transpose(1, 2)
    mask = torch.triu(torch.full((9, 9), -torch.inf, dtype=q.dtype), 1)
    weights = ((q * 8**-0.5) @ k.mT + mask).softmax(-1).view(2, 2, 2, 9, 9)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


def two_softmaxes(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return ((q1 @ k1.mT / 2).softmax(-1) - factor * (q2 @ k2.mT / 2).softmax(-1)) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """Two noise heads are shared by four signal heads."""
    signal = (q @ k.mT).softmax(-1)
    noise = (q[:, :2] @ k[:, :2].mT).softmax(-1).repeat_interleave(2, 1)
    return (signal - factor * noise) @ v


def average(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT).softmax(-1) + (q @ k.mT / 10).softmax(-1)) / 2) @ v


PAIR = "2/4/2 heads, d=8/16, head table; score 0.353553*s; keep k <= q (empty row: nan)"
HALF, FULL = "4 heads, d=4/8; score s/2", "4 heads, d=8"
ROWS = (
    Form("differential", differential, f"{PAIR} + ({PAIR}; gate -bias[])", "differential", (*FLAT, LAMBDA)),
    Form("differential_by_head", differential, f"{PAIR} + ({PAIR}; gate -bias[h])", "differential", (*FLAT, BY_HEAD)),
    Form("two_softmaxes", two_softmaxes, f"{HALF} + ({HALF}; gate -bias[])", "differential", (*QKV, LAMBDA)),
    Form("grouped", grouped, f"{FULL}; score s + ({FULL}, head table; score s; gate -bias[])", "differential", (*QKV, LAMBDA)),
    Form("average", average, f"{FULL}; score s; gate 1/2 + ({FULL}; score s/10; gate 1/2)", "average"),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_sum_is_one_site(row: Form) -> None:
    report = check(row)
    assert report.sites[0].pattern == "sum"


NEAR_MISSES = (
    ("maximum", lambda q, k, v: torch.maximum((q @ k.mT).softmax(-1), (q @ k.mT / 3).softmax(-1)) @ v),
    ("weighed_by_keys", lambda q, k, v: ((q @ k.mT).softmax(-1) + (q @ k.mT).softmax(-2)) @ v),
    ("one_over_values", lambda q, k, v: ((q @ k.mT).softmax(-1) - v[..., :7].mT.softmax(-1)) @ v),
)


@pytest.mark.parametrize(("name", "run"), NEAR_MISSES, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_sum_of_attentions_is_not_fused(name: str, run: object) -> None:
    found = find(capture(Function(run), QKV, {}).gm.graph)
    assert all(isinstance(result, Decline) for _, _, result in found), str(found)


def test_dropout_of_the_sum_is_not_dropout_of_its_terms() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1) - (q @ k.mT / 3).softmax(-1)
        return torch.dropout(weights, 0.5, True) @ v

    found = find(capture(Function(run), QKV, {}).gm.graph)
    assert all(isinstance(result, Decline) for _, _, result in found)
