"""Runs the linear kernels under Triton's interpreter, in a process of its own: reads jobs, writes the worst errors."""

from __future__ import annotations

import json
import sys
from typing import Any

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_linear import emit_linear
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.runtime.triton_load import load
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise
from tests.conformance.triton_worker import poison, repair  # chooses the interpreter

_CAPTURES = {
    "rate": Capture("rate", "float", (2,)),
    "g": Capture("g", "float", (None, 2, None)),
    "f": Capture("f", "float", (None, None)),
    "later": Capture("later", "float", (None, 2, None)),
    "sooner": Capture("sooner", "float", (None, 2, None)),
}


def spec_of(job: dict[str, Any]) -> AttentionSpec:
    """Grouped heads of odd widths; with `decay` a rate a head, with `line` a decay a place, with `factors` one of each key
    and query, and a gate.
    """
    score, captures, gate = ex.s, [], sp.S.One
    if job.get("decay"):
        score, captures = score * sp.exp(-ex.load("rate", ex.h) * (ex.q - ex.k)), [_CAPTURES["rate"]]
    if job.get("line"):
        score = score * sp.exp(ex.load("later", ex.b, ex.h, ex.q) - ex.load("sooner", ex.b, ex.h, ex.k))
        captures = [_CAPTURES["later"], _CAPTURES["sooner"]]
    if job.get("factors"):
        score = score * ex.load("g", ex.b, ex.h, ex.k) * ex.load("f", ex.b, ex.q)
        captures, gate = [*captures, _CAPTURES["g"], _CAPTURES["f"]], ex.load("f", ex.b, ex.q)
    offset = job.get("offset")
    keep = {} if offset is None else {"keep": ex.q - ex.k + offset >= 0}
    return AttentionSpec(
        Heads(2, 1, 1, 10, 6), score, normalizer=Pointwise(ex.t / 4 + 100), captures=tuple(captures), gate=gate, **keep
    ).canonical()


def plain(q: Any, k: Any, v: Any, about: dict[str, Any], offset: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The quadratic definition of the sums."""
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    gap = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    weights = q @ k.mT
    if about["by_key"] is not None:
        weights = weights * about["by_key"].double()[:, :, None] * about["by_query"].double()[..., None]
    if offset is not None:
        gap = gap + offset
        rate = 0.0 if about["rate"] is None else about["rate"].double()[..., None, None]
        weights = weights * torch.exp(rate * gap.clamp_min(0)) * (gap >= 0)
    if about["line"] is not None:
        later, sooner, _ = about["line"]
        weights = weights * torch.exp((later.double()[..., None] - sooner.double()[:, :, None]).masked_fill(gap < 0, 0))
    return weights @ v, weights.sum(-1)


def marks(n_q: int, n_k: int, offset: int, draw: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Logarithms of decays, summed up to each place: they fall, now and then by what fp32 cannot hold, and rise a little."""
    steps = torch.rand(2, 2, n_q + n_k + abs(offset) + 1, generator=draw) - 0.9
    steps[..., ::19] -= 200.0
    summed = steps.cumsum(-1)
    queries, keys = summed[..., max(offset, 0) :][..., :n_q], summed[..., max(-offset, 0) :][..., :n_k]
    return queries, keys, keys.cummin(-1).values


def worst(job: dict[str, Any]) -> dict[str, float]:
    """Largest error of each result, relative to its largest value."""
    spec, dtype, chunk, offset = spec_of(job), getattr(torch, job["dtype"]), job["chunk"], job.get("offset")
    module = load(emit_linear(spec, Layout(job["dtype"]), TritonPlan(chunk, chunk, 4, 1)))
    draw = torch.Generator().manual_seed(0)
    n_q, n_k = job["sizes"]
    q, k = (torch.rand(2, h, n, 10, generator=draw).to(dtype) for h, n in ((2, n_q), (1, n_k)))
    v, grad = (torch.randn(2, h, n, 6, generator=draw).to(dtype) for h, n in ((1, n_k), (2, n_q)))
    if job.get("strided"):
        q, k, v, grad = (torch.stack([t, t], -1)[..., 0].transpose(1, 2).contiguous().transpose(1, 2) for t in
                         (q, k, v, grad))  # fmt: skip
    dtotal = torch.randn(2, 2, n_q, generator=draw)
    about: dict[str, Any] = dict.fromkeys(("by_key", "by_query", "rate", "line"))
    gate = None
    if job.get("decay"):
        about["rate"] = -torch.rand(1, 2, generator=draw) / 4
    if job.get("line"):
        about["line"] = marks(n_q, n_k, offset or 0, draw)
    if job.get("factors"):
        gate = torch.randn(2, 1, n_q, generator=draw)
        about |= {"by_key": torch.randn(2, 2, n_k, generator=draw), "by_query": gate}
    elif job.get("decay") and offset:  # a decay and a shift: the kernel takes a factor by query
        about["by_query"] = torch.ones(1, 1, 1)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    known = dict(about)
    if job.get("decay"):
        leaves.append(known["rate"].double().expand(2, 2).clone().requires_grad_())
        known["rate"] = leaves[-1]
    sums = plain(*leaves[:3], known, offset)
    grads = torch.autograd.grad(sums, leaves, (grad.double(), dtotal.double()))
    more = {**about, "offset": offset or 0, "segments": job.get("segments")}
    raw, total = module.linear(q, k, v, raw=True, **more)
    out, _ = module.linear(q, k, v, gate=gate, **more)
    dq, dk, dv = module.linear_backward(q, k, v, grad, dtotal, **more)
    dk, dv = (t.sum(1, keepdim=True) for t in (dk, dv))
    found = [raw, total, out, dq, dk, dv]
    if job.get("decay"):
        more.pop("line")
        found.append(module.linear_backward_rate(q, k, v, grad, dtotal, **more))
    done = sums[0] / (sums[1] / 4 + 100)[..., None] * (1.0 if gate is None else gate.double()[..., None])
    assert out.dtype == dtype
    names = ("raw", "total", "out", "dq", "dk", "dv", "drate")[: len(found)]
    pairs = zip(names, (*sums, done, *grads), found, strict=True)
    return {name: float((f.double() - g.detach()).abs().max() / g.detach().abs().max()) for name, g, f in pairs}


if __name__ == "__main__":
    poison()
    repair()
    for line in json.loads(sys.stdin.read()):
        print(json.dumps(worst(line)), flush=True)
