"""The factors of a linear form as tensors: their shapes, their values, and none where there is one."""

from __future__ import annotations

import pytest
import torch

from attnopt.analysis.linear_form import linear_form
from attnopt.runtime.linear_factors import Factors, factors
from tests.runtime import test_linear as plain
from tests.runtime.test_linear_native import SPECS


def _made(name: str, n_q: int = 7, n_k: int = 9) -> tuple[Factors, list[torch.Tensor]]:
    given = SPECS[name]
    form = linear_form(given)
    assert form is not None
    qkv, captures = plain.inputs(given, n_q, n_k, torch.float32)
    return factors(given, form, qkv[0], qkv[1], captures, ()), captures


def test_nothing_where_there_is_nothing() -> None:
    assert _made("causal")[0] == Factors()


@pytest.mark.parametrize(("sizes", "offset"), [((7, 9), 2), ((9, 7), -2), ((5, 5), 0)])
def test_the_offset_is_that_of_the_lengths(sizes: tuple[int, int], offset: int) -> None:
    assert _made("bottom_right", *sizes)[0].offset == offset


def test_a_mask_of_keys_is_a_factor() -> None:
    made, (pad,) = _made("padded")
    assert made.by_query is made.gate is made.rate is None
    assert made.by_key is not None
    assert torch.equal(made.by_key, pad.float()[:, None].expand(2, 4, 9))


def test_rates_gates_and_numbers() -> None:
    made, (rate,) = _made("decay")
    assert made.rate is not None
    assert made.gate is not None
    assert made.rate.dtype == torch.float64
    torch.testing.assert_close(made.rate[0], -rate.double(), rtol=0, atol=0)
    assert torch.equal(made.gate, rate.float()[None, :, None].expand(2, 4, 7))
    by_query = _made("all")[0].by_query
    assert by_query is not None
    assert torch.equal(by_query, torch.full((2, 4, 7), 1 / 3))
