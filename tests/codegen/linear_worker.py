"""Runs the linear kernels under Triton's interpreter, in a process of its own: reads jobs, writes the worst errors."""

from __future__ import annotations

import json
import sys
from typing import Any

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_linear import emit_linear
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.runtime.triton_load import load
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise
from tests.conformance.triton_worker import poison, repair  # chooses the interpreter


def spec_of(job: dict[str, Any]) -> AttentionSpec:
    """Grouped heads of odd widths; with `decay` a rate a head."""
    score, captures = ex.s, ()
    if job["decay"]:
        score, captures = ex.s * sp.exp(-ex.load("rate", ex.h) * (ex.q - ex.k)), (Capture("rate", "float", (4,)),)
    keep = {"keep": ex.q - ex.k >= 0} if job["causal"] else {}
    return AttentionSpec(Heads(4, 2, 2, 10, 6), score, normalizer=Pointwise(), captures=captures, **keep).canonical()


def plain(q: Any, k: Any, v: Any, rate: Any, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The quadratic definition."""
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    gap = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    weights = (q @ k.mT) * (torch.exp(rate[:, None, None] * gap) * (gap >= 0) if causal else 1.0)
    return weights @ v, weights.sum(-1)


def worst(job: dict[str, Any]) -> dict[str, float]:
    """Largest error of each result, relative to its largest value."""
    spec, dtype = spec_of(job), getattr(torch, job["dtype"])
    form = linear_form(spec)
    assert form is not None
    chunk = job["chunk"]
    kernel = emit_linear(spec, form, Layout(job["dtype"]), TritonPlan(chunk, chunk, 4, 1))
    module = load(kernel)
    draw = torch.Generator().manual_seed(0)
    n_q, n_k = job["sizes"]
    q, k = (torch.rand(2, h, n, 10, generator=draw).to(dtype) for h, n in ((4, n_q), (2, n_k)))
    v, grad = (torch.randn(2, h, n, 6, generator=draw).to(dtype) for h, n in ((2, n_k), (4, n_q)))
    dtotal = torch.randn(2, 4, n_q, generator=draw)
    rate = -torch.rand(4, generator=draw) / 4 if job["decay"] else torch.zeros(4)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    golden = plain(*leaves, rate.double(), job["causal"])
    grads = torch.autograd.grad(golden, leaves, (grad.double(), dtotal.double()))
    found = module.linear(q, k, v, rate)
    dq, dk, dv = module.linear_backward(q, k, v, rate, grad, dtotal)
    dk, dv = (t.unflatten(1, (2, 2)).sum(2) for t in (dk, dv))
    pairs = zip(("out", "total", "dq", "dk", "dv"), (*golden, *grads), (*found, dq, dk, dv), strict=True)
    return {name: float((f.double() - g.detach()).abs().max() / g.detach().abs().max()) for name, g, f in pairs}


if __name__ == "__main__":
    poison()
    repair()
    for line in json.loads(sys.stdin.read()):
        print(json.dumps(worst(line)), flush=True)
