"""Is every kernel right on the chip: forward, decode and backward of every usual spec in every dtype, against fp64.

Each call is compiled anew, which takes longer than it runs, so that calls are shared among processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from attnopt.aot.inputs import usual_inputs
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen.triton import supports_backward
from attnopt.codegen.triton_plans import CHIPS, Chip, TritonPlan
from attnopt.options import Options
from attnopt.runtime.native import check_rows
from attnopt.runtime.triton_gradient import Kernels, expected
from attnopt.runtime.triton_launch import TritonBackend, build
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Heads

DTYPES = ("bfloat16", "float16", "float32")
HEADS = (Heads(4, 2, 2, 64, 64), Heads(2, 2, 2, 128, 128), Heads(3, 1, 1, 80, 80))
# Batch, queries, keys: tiles, and keys split among programs.
SIZES = {"forward": (2, 257, 333), "decode": (1, 1, 1100), "backward": (2, 150, 170)}
_POISON = 1 << 26


@dataclass(frozen=True)
class Check:
    """One call to be judged."""

    spec: str
    heads: Heads
    dtype: str
    kind: str

    @property
    def about(self) -> dict[str, Any]:
        """What identifies it."""
        return {"spec": self.spec, "width": self.heads.d_qk, "dtype": self.dtype, "kind": self.kind,
                "sizes": SIZES[self.kind]}  # fmt: skip

    def sought(self) -> AttentionSpec:
        """The spec of this name."""
        return dict(standard(self.heads))[self.spec]


def checks(only: Sequence[str] = ()) -> list[Check]:
    """Every usual spec, width, dtype and kind that there is a kernel for."""
    found = []
    for heads in HEADS:
        for name, spec in standard(heads):
            for dtype in DTYPES:
                layout = layout_for(spec, dtype)
                kinds = [k for k in SIZES if k != "backward" or not supports_backward(spec, layout)]
                found += [Check(name, heads, dtype, kind) for kind in kinds if not only or name in only]
    return found


def judged(check: Check, chip: Chip, run: bool, device: str = "cuda") -> dict[str, Any]:
    """The verdict of one call; without `run`, everything up to it."""
    spec, dtype = check.sought(), getattr(torch, check.dtype)
    torch.manual_seed(0)
    tensors = usual_inputs(spec, *SIZES[check.kind], dtype, device)
    if check.kind == "backward":
        return _judged_backward(spec, check, tensors, chip, run)
    backend: TritonBackend = build(spec, layout_for(spec, check.dtype), chip, Options())
    q, k, v, *captures = tensors
    if not run:
        return {"ok": True, "note": f"dry: {backend.variant(q, k)} {backend.kernel.plan}"}
    poison(device)
    out, lse = backend(q, k, v, captures, ())
    verdict = check_rows(spec, (q, k, v), captures, (), out, lse, rows=q.shape[2])
    return {"ok": verdict.ok, "note": str(verdict)}


def _judged_backward(spec: AttentionSpec, check: Check, tensors: list[Tensor], chip: Chip, run: bool) -> dict[str, Any]:
    spec = replace(spec, returns=("lse",))
    kernels = Kernels(spec, layout_for(spec, check.dtype), chip, ())
    if kernels.problem or not run:
        return {"ok": not kernels.problem, "note": kernels.problem or f"dry: {kernels.backward[0].plan}"}
    grad = torch.randn_like(tensors[0][..., : spec.heads.d_v])
    poison(grad.device)
    found = kernels.run(grad, None, tensors, (), kernels.backward)
    needs = [i < 3 for i in range(len(tensors))]
    golden, eager = (expected(spec, grad, None, tensors, (), needs, x) for x in (torch.float64, grad.dtype))
    verdicts = [compare(g, e, found[i], gradients=True) for i, (g, e) in enumerate(zip(golden, eager, strict=True))]
    wrong = [f"d{name}: {v}" for name, v in zip("qkv", verdicts, strict=True) if not v.ok]
    return {"ok": not wrong, "note": "; ".join(wrong) or str(verdicts[0])}


def poison(device: Any) -> None:
    """Fill memory that is free with NaN: what a kernel leaves out of its results shows."""
    blocks = [torch.full((n,), torch.nan, device=device) for n in (_POISON, *([1 << 18] * 16))]
    del blocks


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work returns, or why it failed."""
    try:
        return work()
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return {"ok": False, "note": f"{type(error).__name__}: {text}"}


def _work(check: Check, chip: str) -> dict[str, Any]:
    return attempt(lambda: judged(check, CHIPS[chip], True))


def warm(row: Any, plan: TritonPlan, chip: str) -> dict[str, Any]:
    """Compile a plan of a row of the table, so that Triton's cache on disk has it, by running it once."""
    from gpu_parts.table import run_plan

    return attempt(lambda: run_plan(row, plan, CHIPS[chip]))


def share(
    work: Callable[..., dict[str, Any]], jobs: Sequence[tuple[Any, ...]], deadline: float
) -> Iterator[dict[str, Any]]:
    """The results of `work(*job)` in order, from as many processes as there are cores to spare, up to a deadline."""
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn"))
    try:
        futures = [pool.submit(work, *job) for job in jobs]
        wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        for future in futures:
            late = {"ok": None, "note": "left out: no time was left"}
            yield attempt(future.result) if future.done() else late
    finally:
        for process in getattr(pool, "_processes", {}).values() if not all(f.done() for f in futures) else ():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
