"""The rows of the table, measured: the fastest plan, what others take, and what the chip allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.aot.inputs import usual_inputs
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen.triton_cost import Problem, proposals
from attnopt.codegen.triton_plans import CHIPS, Chip, TritonPlan
from attnopt.options import Options
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_gradient import Kernels
from attnopt.runtime.triton_launch import build
from attnopt.runtime.triton_tune import Clock, Tuner, device_clock
from attnopt.spec import AttentionSpec
from gpu_parts import special
from gpu_parts.rivals import SDPA, flex, gradient_of, operators, sdpa
from gpu_parts.rows import Row
from gpu_parts.workers import attempt

DTYPE = "bfloat16"
# Kinds of rows without plans of their own.
SPECIAL = ("linear", "sparse")


def spec_of(row: Row) -> AttentionSpec:
    """The row's spec, with its lse where gradients need it."""
    if row.kind in SPECIAL:
        return special.spec_of(row)
    spec = dict(standard(row.heads))[row.spec]
    return replace(spec, returns=("lse",)) if row.kind == "backward" else spec


def plans(row: Row, chip: Chip) -> tuple[TritonPlan, ...]:
    """What is worth measuring for a row; nothing for those that have no plans."""
    if row.kind not in ("forward", "decode", "backward"):
        return ()
    return proposals(spec_of(row), chip, DTYPE, row.kind, Problem(row.batch, row.n_q, row.n_k))


def run_plan(row: Row, plan: TritonPlan, chip: Chip) -> dict[str, Any]:
    """Run the row once by this plan."""
    call, _ = prepared(row, chip, "cuda", Options(first_use_check=False), plan)
    call()
    torch.cuda.synchronize()
    return {"ok": True, "note": str(plan)}


def prepared(
    row: Row, chip: Chip, device: str, options: Options, plan: TritonPlan | None = None
) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call that computes the row by a plan, by default the tuned one, and its tensors."""
    from attnopt.codegen import triton

    spec = spec_of(row)
    torch.manual_seed(0)
    tensors = usual_inputs(spec, row.batch, row.n_q, row.n_k, getattr(torch, DTYPE), device)
    layout, (q, k, v, *captures) = layout_for(spec, DTYPE), tensors
    if row.kind == "backward":
        kernels = Kernels(spec, layout, chip, (), Tuner(spec, DTYPE, chip, options))
        grad = torch.randn_like(q)
        emit = triton.EMIT["backward"]
        best = [emit(spec, layout, plan)] if plan is not None else kernels.prepare(grad, None, tensors, ())
        given: list[Any] = []

        def backward() -> Any:
            if not given:
                given.extend(kernels._results(tensors, ()))
            return launch(best, (*tensors, *given, grad, None), {}, "attention_backward")

        return backward, tensors
    backend = build(spec, layout, chip, options)
    if plan is not None:
        kernels_of = [triton.EMIT[row.kind](spec, layout, plan)]
        return lambda: launch(kernels_of, tuple(tensors), backend._more(row.kind)), tensors
    backend.variant(q, k)
    return lambda: backend(q, k, v, captures, ()), tensors


def call_of(row: Row, chip: Chip, device: str, options: Options) -> tuple[Callable[[], Any], list[Tensor]]:
    """What computes the row, and its tensors."""
    if row.kind in SPECIAL:
        return special.call(row, getattr(torch, DTYPE), device, options)
    return prepared(row, chip, device, options)


def prepare(row: Row, chip: Chip, device: str, options: Options) -> dict[str, Any]:
    """Everything of a row up to its times."""
    call, tensors = call_of(row, chip, device, options)
    rivals(row, tensors, None)
    if row.kind in SPECIAL:
        assert call().shape == (row.batch, row.heads.q, row.n_q, row.heads.d_v)
        return {"ok": True, "note": f"dry: {special.proven(row, chip, tensors, DTYPE)}"}
    return {"ok": True, "note": f"dry: {len(plans(row, chip))} plans"}


def measured(row: Row, chip: Chip, device: str, roof: dict[str, float] | None, options: Options) -> dict[str, Any]:
    """Times of one row, and their shares of the chip's rates where those are known."""
    call, tensors = call_of(row, chip, device, options)
    seconds = device_clock(call, 15)
    found = {"ok": True, "ms": seconds * 1e3, "host_us": host(call) * 1e6, "tflops": row.flops / seconds / 1e12}
    if roof:
        found |= {"bandwidth": row.bytes / seconds / roof["bytes"], "floor": row.floor(roof) / seconds}
    found["plan"] = chosen(row, chip, options)
    others = rivals(row, tensors, device_clock)
    return found | {"rivals": others} | speedups(seconds, others)


def host(call: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of the host for one call, when the device is not waited for."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = (time.perf_counter() - begun) / repeats
    torch.cuda.synchronize()
    return taken


def chosen(row: Row, chip: Chip, options: Options) -> str:
    """The plan that tuning chose, in words."""
    if row.kind in SPECIAL:
        return special.used(row, options)
    tuner = Tuner(spec_of(row), DTYPE, chip, options)
    plan = tuner.plan(row.kind, Problem(row.batch, row.n_q, row.n_k), device=torch.cuda.get_device_name())
    return str(plan or "default")


def rivals(row: Row, tensors: list[Tensor], clock: Clock | None) -> dict[str, Any]:
    """Milliseconds of every rival, or why there are none; without a clock, they are only made."""
    if not tensors:
        return {}
    backward = row.kind == "backward"
    leaves = [t.detach().requires_grad_(backward) if i < 3 else t for i, t in enumerate(tensors)]
    found = {name: timed(partial(sdpa, row, leaves, name), leaves, backward, clock) for name in SDPA}
    if row.kind == "linear":
        found["operators"] = timed(partial(operators, spec_of(row), leaves), leaves, backward, clock)
    return found | {"flex": timed(partial(flex, row, leaves), leaves, backward, clock)}


def timed(
    make: Callable[[], Any],
    leaves: Sequence[Tensor],
    backward: bool,
    clock: Callable[[Callable[[], Any]], float] | None,
) -> Any:
    """Milliseconds of what `make` gives, or the reason in words."""
    if clock is None:
        return "dry"

    def work() -> dict[str, Any]:
        call = make()
        if isinstance(call, str):
            return {"ok": False, "note": call}
        if backward:
            call = gradient_of(call, leaves, torch.randn_like(leaves[0]))
        return {"ok": True, "ms": clock(call) * 1e3}

    result = attempt(work)
    return result.get("ms", result.get("note"))


def speedups(seconds: float, others: dict[str, Any]) -> dict[str, float]:
    """How often faster than the best of PyTorch's kernels, and than FlexAttention."""
    times = {name: x / 1e3 for name, x in others.items() if isinstance(x, float)}
    best = min((x for name, x in times.items() if name in SDPA), default=None)
    found = {} if best is None else {"times_sdpa": best / seconds}
    own = min((x for name, x in times.items() if name.startswith("flex")), default=None)
    return found | ({} if own is None else {"times_flex": own / seconds})


def ceilings() -> dict[str, Any]:
    """`roof`: the chip's rate of bf16 products in FLOP/s, and its copy bandwidth in bytes/s."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    flops = 2.0 * 8192**3 / device_clock(lambda: a @ b, 15)
    copied = 2.0 * source.nbytes / device_clock(lambda: target.copy_(source), 15)
    return {"ok": True, "note": "", "roof": {"flops": flops, "bytes": copied}}


def about(row: Row) -> dict[str, Any]:
    """What identifies a row in the report."""
    return {"name": row.name, "kind": row.kind, "sizes": (row.batch, row.n_q, row.n_k), "heads": str(row.heads)}


def whole(row: Row, chip: str, roof: dict[str, float] | None, options: Options) -> dict[str, Any]:
    """A row measured on the chip of this name, here."""
    return measured(row, CHIPS[chip], "cuda", roof, options)


def dry(row: Row, chip: str, roof: None, options: Options) -> dict[str, Any]:
    """Everything of a row up to its times."""
    return prepare(row, CHIPS[chip], "cuda", options)


def thorough(row: Row) -> dict[str, Any]:
    """What FlexAttention takes for a row with its own tuning, which takes long."""
    spec = spec_of(row)
    tensors = usual_inputs(spec, row.batch, row.n_q, row.n_k, getattr(torch, DTYPE), "cuda")
    make = partial(flex, row, tensors, "max-autotune-no-cudagraphs")
    return {"ok": True, "flex tuned": timed(make, tensors, False, device_clock)}


def add_thorough(row: dict[str, Any], result: dict[str, Any]) -> None:
    """Put what `thorough` found into a measured row."""
    row["rivals"]["flex tuned"] = result.get("flex tuned", result.get("note"))
    row |= speedups(row["ms"] / 1e3, row["rivals"])
