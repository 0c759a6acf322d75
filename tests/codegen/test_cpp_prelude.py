"""The fixed part: lane tables, and the special numbers of the elementary functions."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.codegen.base import Plan
from attnopt.codegen.cpp_prelude import prelude
from attnopt.spec import AttentionSpec, Capture, Heads
from tests.codegen.harness import run


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_tables_have_one_entry_per_lane(lanes: int) -> None:
    text = prelude(lanes, False)
    assert f"const VI kIota = {{{', '.join(map(str, range(lanes)))}}};" in text
    assert "@" not in text


def test_half_is_defined_only_where_it_is_used() -> None:
    assert "_Float16" not in prelude(8, False)
    assert "_Float16" in prelude(8, True)


def _values(name: str, points: torch.Tensor, lanes: int = 8) -> torch.Tensor:
    """A function of fp32 numbers by a kernel: lse of a single key is its logit."""
    x = ex.load("x", ex.q)
    score = {"exp": sp.exp(ex.s * 0 + x + ex.s), "tanh": sp.tanh(x + ex.s)}[name]
    spec = AttentionSpec(
        Heads(1, 1, 1, 8, 8), score=score, captures=(Capture("x", "float", (None,)),), returns=("lse",)
    )
    zero = torch.zeros(1, 1, points.numel(), 8)
    plan = Plan(48, 128, lanes, 4)
    return run(spec, [zero, torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8), points], plan=plan)[1][0, 0]


@pytest.mark.parametrize("name", ["exp", "tanh"])
def test_elementary_functions_are_exact_to_a_few_ulp(name: str) -> None:
    points = torch.cat([torch.linspace(-80, 80, 400), torch.tensor([0.0, 1e-6, -1e-6, 0.624, 0.626, -100.0])])
    exact = getattr(torch, name)(points.double())
    assert ((_values(name, points).double() - exact).abs() <= 4e-7 * exact.abs() + 1e-44).all()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_the_hyperbolic_tangent_has_its_digits_everywhere(lanes: int) -> None:
    """Seven roundings of at most 2^-24 are in it; of all floats from 2^-25 to 12 none meets more than 2.76e-7."""
    small = torch.logspace(-44, 0, 3000, dtype=torch.float64).float()  # denormals first
    size = torch.cat([small, torch.linspace(0, 12, 20001), torch.logspace(1, 38, 200, dtype=torch.float64).float()])
    points = torch.cat([size, -size])
    found, exact = _values("tanh", points, lanes).double(), torch.tanh(points.double())
    assert ((found - exact).abs() <= 2.8e-7 * exact.abs() + 1.5e-45).all()  # one denormal
    assert (found.abs() <= 1).all()


def test_the_hyperbolic_tangent_of_what_is_no_number() -> None:
    inf = float("inf")
    assert _values("tanh", torch.tensor([inf, -inf, 3.4e38, -3.4e38])).tolist() == [1, -1, 1, -1]
    assert _values("tanh", torch.tensor([float("nan")])).isnan().all()
