"""The demo's measurements: golden outputs, errors, the contract, times, memory."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from attnopt.demo import measure
from attnopt.demo.measure import Error


class _Upcasts(nn.Module):
    """Casts to fp32 inside, as norms and softmax of many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.softmax(self.linear(x), dim=-1, dtype=torch.float32).to(x.dtype)
        return {"out": y.float().to(torch.float32).type_as(x), "ids": torch.arange(3)}


def test_golden_is_fp64_throughout() -> None:
    torch.manual_seed(0)
    model, x = _Upcasts(), torch.randn(4, 64)
    (golden,) = measure.golden(model, (x,), {})
    exact = torch.softmax(x.double() @ model.linear.weight.double().T + model.linear.bias.double(), -1)
    assert golden.dtype == torch.float64
    # A step left in fp32 would show at 1e-8; fp64 sums of 64 terms agree to about 64 ulp.
    assert (golden - exact).abs().max() < 64 * torch.finfo(torch.float64).eps
    assert model.linear.weight.dtype == torch.float32, "the model itself is left alone"


def test_error_measures_all_outputs() -> None:
    reference = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    error = measure.error([torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])], reference)
    assert error == Error(4.0, 2.5)


@pytest.mark.parametrize(
    "outputs",
    [[], [torch.zeros(3)], [torch.tensor([0.0, math.nan])], [torch.tensor([math.inf, 0.0])]],
    ids=["number", "shape", "nan", "inf"],
)
def test_what_cannot_be_compared_is_nan_and_outside_the_contract(outputs: list[torch.Tensor]) -> None:
    reference = [torch.ones(2, dtype=torch.float64)]
    error = measure.error(outputs, reference)
    assert math.isnan(error.max)
    assert not measure.within_contract(error, Error(1.0, 1.0), reference)


def test_elements_that_are_nan_in_both_are_left_out() -> None:
    reference = [torch.tensor([1.0, math.nan], dtype=torch.float64)]
    assert measure.error([torch.tensor([1.5, math.nan])], reference) == Error(0.5, 0.5)


def test_the_contract_has_the_edges_that_it_states() -> None:
    reference, eager = [torch.ones(4, dtype=torch.float64)], Error(1e-3, 1e-4)
    assert measure.within_contract(Error(2e-3, 1.2e-4), eager, reference)
    assert not measure.within_contract(Error(2.1e-3, 1e-4), eager, reference)
    assert not measure.within_contract(Error(1e-3, 1.3e-4), eager, reference)
    ulp = torch.finfo(torch.float32).eps
    assert measure.within_contract(Error(ulp, ulp), Error(0.0, 0.0), reference)


def test_interleaved_takes_turns_and_gives_medians() -> None:
    order: list[str] = []
    slow, fast = measure.interleaved(
        lambda: (order.append("a"), time.sleep(0.02)), lambda: order.append("b"), budget=0.1
    )
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(order) >= 2 * 5
    assert slow >= 0.02 > fast


def test_peak_memory_sees_a_buffer_that_is_freed_again() -> None:
    size = 64 * 2**20
    small = measure.peak_memory(lambda: torch.ones(8))
    large = measure.peak_memory(lambda: torch.ones(size // 4).sum())
    if small is None or large is None:
        assert not measure.Path("/proc/self/clear_refs").exists()
        return
    assert small < size // 4
    assert 0.9 * size < large < 2 * size
