"""The skeleton of the backward as it runs: every element is written, nothing outside is, arguments are checked."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from attnopt.codegen.cpp_backward import emit_backward
from attnopt.codegen.cpp_plans import backward_plan
from tests.codegen.harness import compiled, dense, layout_of
from tests.specs import Sizes, case


def gradients(name: str, n_q: int, n_k: int, threads: int) -> tuple[int, list[Tensor], list[Tensor]]:
    """The code, the kernel's gradients of q, k, v and captures, and those of the dense fp64 evaluation."""
    item, generator = case(name), torch.Generator().manual_seed(0)
    heads = item.spec.heads
    shapes = ((heads.q, n_q, heads.d_qk), (heads.k, n_k, heads.d_qk), (heads.v, n_k, heads.d_v))
    tensors = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    tensors += item.captures(Sizes(2, heads.q, n_q, n_k), generator)
    leaves = [t.double().requires_grad_() for t in tensors]
    out, lse = dense(item.spec, leaves)
    grad = torch.randn(out.shape, generator=generator)
    exact = torch.autograd.grad(out, leaves, grad.double())
    learned = [c.name for c in item.spec.captures]
    kernel = emit_backward(item.spec, layout_of(item.spec, torch.float32, tensors[3:]), backward_plan(8), learned)
    found = [torch.full(t.shape, 12345.0) for t in tensors[:3]]
    tables = [torch.zeros(t.shape, dtype=torch.float64) for t in tensors[3:]]
    given = [*tensors, out.detach().float(), grad, lse.detach().float().contiguous(), None, *found, *tables]
    meta = [2, n_q, n_k, *(x for t in (*tensors[:3], out, grad, *tensors[3:]) for x in t.stride())]
    meta += [x for t in tables for x in (*t.stride(), t.numel())]
    pointers = [None if t is None else t.data_ptr() for t in given]
    backward = compiled(kernel.source, kernel.key).attnopt_backward
    arguments = (ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int64 * len(meta))(*meta)
    return int(backward(*arguments, ctypes.c_int32(threads))), [*found, *tables], list(exact)


@pytest.mark.parametrize(("name", "threads"), [("buckets", 3), ("gqa", 1)])
def test_gradients_are_those_of_the_dense_evaluation(name: str, threads: int) -> None:
    for n_q, n_k in ((1, 1), (101, 130)):
        code, found, exact = gradients(name, n_q, n_k, threads)
        assert code == 0
        for mine, theirs in zip(found, exact, strict=True):
            # Sums of a few hundred products of numbers of size one, in fp32.
            torch.testing.assert_close(mine.double(), theirs, atol=2e-5 * (1 + float(theirs.abs().max())), rtol=0)
