"""Which heads one program adds up, and what the launcher adds up instead."""

from __future__ import annotations

import pytest
import torch

from attnopt.aot.standard import layout_for
from attnopt.codegen import triton
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_readers import by_runs
from attnopt.runtime.triton_load import load
from attnopt.spec import Heads
from tests.conformance.triton_cases import case


@pytest.mark.parametrize(
    ("heads", "runs"),
    [
        (Heads(4, 2, 2, 8, 8), True),
        (Heads(4, 4, 4, 8, 8), True),
        (Heads(4, 2, 4, 8, 8), False),
        (Heads(4, 2, 2, 8, 8, (0, 1, 0, 1), (0, 1, 0, 1)), False),
        (Heads(4, 2, 2, 8, 8, (0, 0, 1, 1), (0, 1, 1, 1)), False),
    ],
)
def test_runs_are_recognised(heads: Heads, runs: bool) -> None:
    assert by_runs(heads) is runs


def test_heads_that_nothing_reads_have_no_gradient() -> None:
    pytest.importorskip("triton")
    spec = case("two_maps").spec
    made = load(triton.emit_backward(spec, layout_for(spec, "float32"), TritonPlan(16, 16, 4, 1)))
    assert made.KEY_READERS == [[0, 2], [1, 3]]
    assert made.VALUE_READERS == [[1, 2], [], [0, 3]]
    parts, like = torch.arange(4.0).reshape(1, 4, 1, 1), torch.zeros(1, 3, 1, 1, dtype=torch.bfloat16)
    found = made.added(parts, made.VALUE_READERS, like)
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == [3.0, 0.0, 3.0]
