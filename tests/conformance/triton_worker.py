"""Runs generated Triton kernels under Triton's interpreter, in a process of its own: reads jobs, writes verdicts.

The interpreter has to be chosen before Triton is imported, and must not be seen by other tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import numpy as np
import torch
from triton.language import bfloat16, float16, float32
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

from attnopt.analysis.chosen import lowered
from attnopt.analysis.plain import weights_of
from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.triton_pages import NEW
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_side import emit_side, supported_side
from attnopt.errors import SpecError
from attnopt.expr import load_names
from attnopt.runtime.bounds import outside
from attnopt.runtime.chosen import chosen
from attnopt.runtime.gradient import expected
from attnopt.runtime.native import check_entries, layout_of
from attnopt.runtime.pages import entry
from attnopt.runtime.side_kernels import Trusted
from attnopt.runtime.triton_launch import Listed
from attnopt.runtime.triton_load import interpreter_problem, load
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec
from tests.conformance.judge import judge, tensors
from tests.conformance.paged_inputs import lengths_of, paged
from tests.conformance.triton_cases import case
from tests.specs import Sizes

if interpreter_problem():
    raise SystemExit(interpreter_problem())  # once, not for every job
np.seterr(all="ignore")
torch.set_num_threads(1)


def poison() -> None:
    """Fresh memory holds NaN, so that what a kernel leaves unwritten is seen."""
    fresh = torch.Tensor.new_empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = fresh(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]


def repair() -> None:
    """The interpreter keeps bf16 as 16-bit integers: it cuts where a chip rounds, and multiplies the integers.

    Products are taken in fp32, which holds those of both half precisions.
    """
    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(self: Any, x: Any) -> Any:
        return cast(self, x, float32) if x.dtype.scalar in (bfloat16, float16) else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, wide(self, a), wide(self, b), *rest)

    def create_fp_trunc(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != float32 or target.scalar != bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), bfloat16)

    # Code that checks integers for overflow would be built, slowly, and never run.
    object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)
    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = create_dot, create_fp_trunc


def changed(job: dict[str, Any], kernel: triton.TritonKernel) -> triton.TritonKernel:
    """The kernel as the job breaks it. Raises `LookupError` where there is nothing to break."""
    if "change" not in job:
        return kernel
    old, new = job["change"]
    if old not in kernel.source:
        raise LookupError(old)
    return replace(kernel, source=kernel.source.replace(old, new))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one case at one size, layout, dtype and plan."""
    item = case(job["case"])
    dtype = getattr(torch, job["dtype"])
    batch, n_q, n_k = job["sizes"]
    inputs = tensors(item.spec, batch, n_q, n_k, job.get("layout", "contiguous"), dtype, job.get("size", 1.0))
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    spec = item.spec.canonical()
    emit, more = KINDS[job.get("kind", "forward")]
    if spec.select is not None:
        captures, spec = [*captures, chosen(spec, *inputs[:2], captures, item.scalars)], lowered(spec)
    plan = TritonPlan(*job["plan"])
    plan = replace(plan, listed=job.get("kind") == "listed")
    kernel = emit(spec, layout_of(k_axes(spec), inputs[0], captures), plan)
    kernel = changed(job, kernel)
    given = {x: job[x] for x in more}
    if plan.listed:
        given["visited"] = Listed(spec, [kernel])(plan, (*inputs, *captures, *item.scalars))
    result = load(kernel).attention(*inputs, *captures, *item.scalars, **given)
    verdict = judge(spec, inputs, captures, item.scalars, result)
    return {**job, "ok": verdict.ok, "verdict": str(verdict)}


def pages(job: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one case with ragged lengths and its keys in pages, each entry against its own keys."""
    item = case(job["case"])
    batch, n_q, n_k = job["sizes"]
    inputs = tensors(item.spec, batch, n_q, n_k, "contiguous", getattr(torch, job["dtype"]), 0.5)
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    n_new = job.get("new", 0)
    spec, lengths = item.spec.canonical(), lengths_of(batch, n_k - n_new)
    layout = replace(layout_of(k_axes(spec), inputs[0], captures), page=job["page"], new=n_new > 0)
    emit, more = KINDS[job["kind"].removeprefix("paged ")]
    given = paged(inputs, lengths, job["page"], captures, item.scalars, n_new=n_new)
    lengths = given.lengths
    for n in {*lengths} - {0}:
        if outside(spec, inputs[0], inputs[1][:, :, :n], captures, item.scalars):
            return {**job, "ok": True, "declined": f"loads leave their tensors at {n} keys", "verdict": ""}
    try:
        kernel = changed(job, emit(spec, layout, TritonPlan(*job["plan"])))
    except SpecError as error:
        return {**job, "ok": True, "declined": str(error), "verdict": ""}
    pools, given_more = (given.keys.transpose(1, 2), given.values.transpose(1, 2)), {x: job[x] for x in more}
    given_more |= {name: t.transpose(1, 2) for name, t in zip(NEW, given.new, strict=False)}
    out, lse = load(kernel).attention(
        inputs[0], *pools, *captures, *item.scalars, given.page_table, given.key_lengths, **given_more
    )
    for b, n in enumerate(lengths):
        own = (inputs[0][b : b + 1], *entry(given, b, n))
        result = out, lse if "lse" in spec.returns else None
        if not n and not bool((out[b] == 0).all()):
            return {**job, "ok": False, "verdict": "an entry without keys is not zeros"}
        verdict = check_entries(spec, own, captures, item.scalars, result, torch.tensor([b]), batch, n_q)
        if not verdict.ok:
            return {**job, "ok": False, "verdict": f"entry {b} of {n} keys: {verdict}"}
    return {**job, "ok": True, "verdict": ""}


def backward(job: dict[str, Any]) -> dict[str, Any]:
    """The verdict on the gradients of q, k, v and all floating-point captures of one case."""
    item = case(job["case"])
    dtype = getattr(torch, job["dtype"])
    batch, n_q, n_k = job["sizes"]
    inputs = tensors(item.spec, batch, n_q, n_k, job.get("layout", "contiguous"), dtype, 1.0)
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    spec = replace(item.spec, returns=("lse",)).canonical()
    learned = [c.name for c in spec.captures if c.kind == "float" and c.name not in load_names(spec.gate, spec.weight)]
    layout = layout_of(k_axes(spec), inputs[0], captures)
    reason = triton.supports_backward(spec, layout, learned)
    if reason is not None:
        return {**job, "ok": True, "declined": reason, "verdict": ""}
    with torch.no_grad():
        # As the runtime does it: gradients start from results that were not rounded.
        exact = inputs[0].new_empty((batch, spec.heads.q, n_q, spec.heads.d_v), dtype=torch.float32)
        forward = load(triton.emit(spec, layout, TritonPlan(*job["plan"])))
        out, lse = forward.attention(*inputs, *captures, *item.scalars, out=exact)
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape, generator=generator)]
        kernel = changed(job, triton.emit_backward(spec, layout, TritonPlan(*job["plan"]), learned))
        found = load(kernel).attention_backward(*inputs, *captures, *item.scalars, out, lse, *grads)
    needs = [True, True, True, *(c.name in learned for c in spec.captures)]
    given = (spec, *grads, (*inputs, *captures), item.scalars, needs)
    golden, eager = (expected(*given, work) for work in (torch.float64, dtype))
    for name, g, e, x in zip(("dq", "dk", "dv", *learned), golden, eager, found, strict=True):
        verdict = compare(g, e, x.to(e.dtype), gradients=True)
        if not verdict.ok:
            return {**job, "ok": False, "verdict": f"{name}: {verdict}"}
    return {**job, "ok": True, "verdict": ""}


class Side:
    """Column mass and weights by the kernels of a job, as the runtime takes them."""

    problem = ""

    def __init__(self, job: dict[str, Any], spec: AttentionSpec, layout: Layout) -> None:
        self.kernel = changed(job, emit_side(spec, layout, TritonPlan(*job["plan"])))

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, captures: Any, scalars: Any, name: str
    ) -> torch.Tensor:
        made: torch.Tensor = load(self.kernel).attention_side(q, k, *captures, *scalars, rows, name)
        return made


def side(job: dict[str, Any]) -> dict[str, Any]:
    """The verdict on the column mass or the weights of one case."""
    item = case(job["case"])
    batch, n_q, n_k = job["sizes"]
    q, k, _ = tensors(item.spec, batch, n_q, n_k, job.get("layout", "contiguous"), getattr(torch, job["dtype"]), 1.0)
    captures = item.captures(Sizes(batch, item.spec.heads.q, n_q, n_k), torch.Generator().manual_seed(1))
    spec = weights_of(item.spec)
    layout = layout_of(k_axes(spec), q, captures)
    reason = supported_side(spec, layout)
    if reason is not None:
        return {**job, "ok": True, "declined": reason, "verdict": ""}
    runner = Trusted(spec, Side(job, spec, layout))
    verdict = runner.compare(q, k, captures, item.scalars, job["name"], most=max(n_q, n_k))
    return {**job, "ok": verdict.ok, "verdict": f"{job['name']}: {verdict}"}


KINDS = {"forward": (triton.emit, ()), "decode": (triton.emit_decode, ("splits",)), "listed": (triton.emit, ())}


def main(jobs: Sequence[dict[str, Any]]) -> None:
    """One line of JSON for each job."""
    poison()
    repair()
    for job in jobs:
        try:
            kind = job.get("kind", "forward")
            answer = {"backward": backward, "side": side}.get(kind, pages if kind.startswith("paged") else run)(job)
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            answer = {
                **job,
                "ok": isinstance(cause, LookupError) and "change" in job,
                "verdict": f"{type(cause).__name__}: {cause}",
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
