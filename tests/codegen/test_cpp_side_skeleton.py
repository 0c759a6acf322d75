"""The skeleton of column mass and weights as it runs: every element is written, nothing outside is, arguments count."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attnopt.codegen.cpp_plans import backward_plan
from attnopt.codegen.cpp_side import emit_side
from attnopt.returns import AGAIN
from attnopt.runtime.reference import reference
from attnopt.runtime.weights import filled_weights
from tests.codegen.harness import compiled, layout_of
from tests.specs import case

SPEC = case("window").spec


def run(q: Tensor, k: Tensor, weights: bool, threads: int, rows: Tensor | None) -> tuple[int, Tensor]:
    """The kernel's code, and its result with guards around it."""
    kernel = emit_side(SPEC, layout_of(SPEC, q.dtype, ()), backward_plan(8))
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    count = batch * heads * n_k * (n_q if weights else 1)
    guarded = torch.full((count + 32,), 12345.0)
    numbers = [batch, n_q, n_k, *q.stride(), *k.stride()]
    pointers = [q.data_ptr(), k.data_ptr(), None if rows is None else rows.data_ptr()]
    status = compiled(kernel.source, kernel.key).attnopt_side(
        (ctypes.c_void_p * 3)(*pointers), ctypes.c_void_p(guarded[16:].data_ptr()),
        (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_int32(weights), ctypes.c_int32(threads),
    )  # fmt: skip
    assert bool((guarded[:16] == 12345.0).all())
    assert bool((guarded[-16:] == 12345.0).all())
    return status, guarded[16:-16]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_element_is_written(threads: int) -> None:
    q, k = (torch.randn(2, 4, n, 32, generator=torch.Generator().manual_seed(n)) for n in (107, 131))
    rows = reference(replace(SPEC, returns=AGAIN), q, k, k)[1].contiguous()
    want = filled_weights(SPEC, q, k)
    status, made = run(q, k, True, threads, rows)
    assert status == 0
    assert_close(made.view_as(want), want)
    status, made = run(q, k, False, threads, rows)
    assert status == 0
    assert_close(made.view(2, 4, 131), want.sum(-2))


def test_arguments_are_checked() -> None:
    q = torch.randn(1, 4, 3, 32)
    assert run(q, q, True, 1, None)[0] == 2
    assert run(q, q, True, 0, torch.zeros(1, 4, 3, 2))[0] == 2
