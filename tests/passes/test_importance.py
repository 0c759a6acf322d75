"""Importance of heads against what it is defined as."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.passes.importance import SCORES, ablation, by_head, gradient, magnitude, zeroed
from attnopt.patterns import projections
from tests.passes.tiny import HEADS, INNER, WIDTH, model, stage
from tests.passes.tiny import zeroed as zeroed_model


def _tensor(scores: list[float]) -> torch.Tensor:
    return torch.tensor(scores, dtype=torch.float64)


def _setup() -> tuple[Any, ...]:
    module, x = model("concatenated", rotary=True)
    at = stage(module, x)
    (region,) = at.regions.values()
    return module, x, at, [(region, projections.find(region))]


def test_gradient_is_the_derivative_by_a_gate_on_each_head() -> None:
    module, x, at, sites = _setup()
    (seen,) = gradient(at.gm, at.tensors, sites, at.calibration)
    gates = torch.ones(2, HEADS, dtype=torch.float64, requires_grad=True)
    hidden = []
    handle = module.o.register_forward_pre_hook(lambda _, given: hidden.append(given[0]))
    module(x)
    handle.remove()
    gated = hidden[0].detach().unflatten(-1, (HEADS, WIDTH)) * gates[:, None, :, None]
    module.o(gated.flatten(-2)).square().mean().backward()
    expected = gates.grad.abs().sum(0)
    torch.testing.assert_close(_tensor(seen), expected / expected.norm(), rtol=1e-9, atol=1e-12)


def test_ablation_is_the_change_when_a_head_is_zeroed() -> None:
    module, x, at, sites = _setup()
    (seen,) = ablation(at.gm, at.tensors, sites, at.calibration)
    with torch.no_grad():
        whole = module(x)
        for head in range(HEADS):
            gap = zeroed_model(module, {"": (head,)}, x)(x) - whole
            assert seen[head] == pytest.approx((gap.norm() / whole.norm()).item(), rel=1e-9)


def test_magnitude_reads_value_rows_and_output_columns() -> None:
    module, _, at, sites = _setup()
    (seen,) = magnitude(at.gm, at.tensors, sites, at.calibration)
    rows = module.qkv.weight[2 * INNER :].view(HEADS, WIDTH, INNER)
    columns = module.o.weight.view(INNER, HEADS, WIDTH)
    expected = torch.stack([rows[h].norm() * columns[:, h].norm() for h in range(HEADS)])
    torch.testing.assert_close(_tensor(seen), (expected / expected.norm()).detach(), rtol=1e-9, atol=0)
    assert set(SCORES) == {"gradient", "ablation", "magnitude"}


def test_zeroing_and_sums_follow_the_outputs_layout() -> None:
    _, _, _, ((region, _),) = _setup()
    x = torch.ones(2, HEADS, 5, WIDTH)
    assert by_head(x, region).tolist() == [[5.0 * WIDTH] * HEADS] * 2
    assert by_head(zeroed(region, [1, 3])(x), region).tolist() == [[5.0 * WIDTH, 0, 5.0 * WIDTH, 0]] * 2
