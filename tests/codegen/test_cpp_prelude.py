"""The fixed part: lane tables, and the special numbers of the elementary functions."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
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


@pytest.mark.parametrize("name", ["exp", "tanh"])
def test_elementary_functions_are_exact_to_a_few_ulp(name: str) -> None:
    """Lse of a single key is its logit, so a kernel of one key shows the function itself."""
    x = ex.load("x", ex.q)
    score = {"exp": sp.exp(ex.s * 0 + x + ex.s), "tanh": sp.tanh(x + ex.s)}[name]
    spec = AttentionSpec(
        Heads(1, 1, 1, 8, 8), score=score, captures=(Capture("x", "float", (None,)),), returns=("lse",)
    )
    points = torch.cat([torch.linspace(-80, 80, 400), torch.tensor([0.0, 1e-6, -1e-6, 0.624, 0.626, -100.0])])
    zero = torch.zeros(1, 1, points.numel(), 8)
    _, lse = run(spec, [zero, torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8), points])
    exact = getattr(torch, name)(points.double())
    assert ((lse[0, 0].double() - exact).abs() <= 4e-7 * exact.abs() + 1e-44).all()
