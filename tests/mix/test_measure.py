"""What is measured on calibration inputs, against its definition."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from attnopt.mix.measure import Measured, fitted, picked


def test_the_fit_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 5, generator=generator, dtype=torch.float64) + 3
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = fitted(tokens, tokens @ weight.t() + bias)
    assert_close(found[0], weight, atol=2e-3, rtol=0)
    assert_close(found[1], bias, atol=1e-2, rtol=0)
    again = fitted(tokens, tokens @ weight.t() + bias)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_features_without_variance_have_a_fit() -> None:
    weight, bias = fitted(torch.ones(4, 3, dtype=torch.float64), torch.arange(4.0).double()[:, None])
    assert not weight.any()
    assert_close(bias, torch.tensor([1.5], dtype=torch.float64))


def test_what_a_head_is_missed_for() -> None:
    outputs = torch.randn(6, 2, 3, dtype=torch.float64)
    columns = [torch.randn(4, 3), torch.zeros(4, 3)]
    missed = Measured(outputs=[outputs[:4], outputs[4:]]).missed(columns)
    want = ((outputs[:, 0] - outputs[:, 0].mean(0)) @ columns[0].double().t()).norm(dim=-1)
    assert_close(missed[:, 0], want)
    assert not missed[:, 1].any()


def test_rows_are_spread_evenly() -> None:
    cpu = torch.device("cpu")
    assert picked(3, cpu).tolist() == [0, 1, 2]
    many = picked(100_000, cpu)
    assert len(many) == 2048
    assert (many[0], many[-1]) == (0, 99_999)
