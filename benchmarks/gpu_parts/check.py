"""Is every kernel right on the chip: every kind of every usual spec in every dtype, against fp64.

Each call is compiled anew, which takes longer than it runs, so that calls are shared among processes (`workers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.linear_form import linear_form
from attnopt.aot.inputs import usual_inputs
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import supports_backward
from attnopt.codegen.triton_linear import emit_linear, linear_plans, supported_linear
from attnopt.codegen.triton_plans import CHIPS, Chip, TritonPlan
from attnopt.options import Options
from attnopt.runtime.gradient import expected
from attnopt.runtime.linear_gradient import Gradients
from attnopt.runtime.native import check_rows
from attnopt.runtime.triton_gradient import Kernels
from attnopt.runtime.triton_launch import TritonBackend, build
from attnopt.runtime.triton_linear import TritonLinear
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Heads
from gpu_parts import paged
from gpu_parts.paths import PATHS

DTYPES = ("bfloat16", "float16", "float32")
HEADS = (Heads(4, 2, 2, 64, 64), Heads(2, 2, 2, 128, 128), Heads(3, 1, 1, 80, 80))
# Batch, queries, keys: tiles, and keys split among programs.
SIZES = {"forward": (2, 257, 333), "decode": (1, 1, 1100), "backward": (2, 150, 170),
         "linear": (2, 333, 333), "linear backward": (1, 200, 200), "paged": (3, 1, 1100),
         "paged prefill": (3, 257, 333)}  # fmt: skip
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
                "sizes": SIZES.get(self.kind, ())}  # fmt: skip

    def sought(self) -> AttentionSpec:
        """The spec of this name."""
        return dict(standard(self.heads))[self.spec]


def checks(only: Sequence[str] = ()) -> list[Check]:
    """Every usual spec, width, dtype and kind that there is a kernel for, and the ways to them (`only` `paths`)."""
    found = [Check("paths", HEADS[1], DTYPES[0], kind) for kind in PATHS if not only or "paths" in only]
    for heads in HEADS:
        for name, spec in standard(heads):
            for dtype in DTYPES:
                layout = layout_for(spec, dtype)
                kinds = [kind for kind in SIZES if _has(kind, spec, layout)]
                if name not in paged.SPECS or dtype != DTYPES[0]:
                    kinds = [kind for kind in kinds if kind not in paged.PAGES]
                found += [Check(name, heads, dtype, kind) for kind in kinds if not only or name in only]
    return found


def _has(kind: str, spec: AttentionSpec, layout: Layout) -> bool:
    """Whether there is such a kernel, on the chip with the most plans."""
    if kind == "backward":
        return not supports_backward(spec, layout)
    widths = spec.heads.d_qk, spec.heads.d_v
    return "linear" not in kind or bool(
        not supported_linear(spec, layout) and linear_plans(CHIPS["sm_90"], layout.dtype, *widths)
    )


def judged(check: Check, chip: Chip, run: bool, device: str = "cuda") -> dict[str, Any]:
    """The verdict of one call; without `run`, everything up to it."""
    if check.kind in PATHS:
        return PATHS[check.kind](chip, device) if run else {"ok": True, "note": f"dry: {check.kind}"}
    spec, dtype = check.sought(), getattr(torch, check.dtype)
    torch.manual_seed(0)
    tensors = usual_inputs(spec, *SIZES[check.kind], dtype, device)
    if check.spec == "linear":  # features: what rows are divided by must not be near zero
        tensors[:2] = [t.abs() for t in tensors[:2]]
    if check.kind in paged.PAGES:
        return paged.judged(spec, check.dtype, check.kind, tensors, chip, run)
    if "linear" in check.kind:
        return _judged_linear(spec, check, tensors, chip, run)
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
    return _compared(spec, grad, tensors, [found[i] for i in range(3)])


def _judged_linear(spec: AttentionSpec, check: Check, tensors: list[Tensor], chip: Chip, run: bool) -> dict[str, Any]:
    spec, layout = spec.canonical(), Layout(check.dtype)
    form, plans = linear_form(spec), linear_plans(chip, check.dtype, spec.heads.d_qk, spec.heads.d_v)
    if form is None or not plans:
        return {"ok": None, "note": f"no plan for {chip.name}"}
    backend = TritonLinear(spec, form, chip, [emit_linear(spec, layout, plan) for plan in plans])
    q, k, v, *captures = tensors
    if not run:
        return {"ok": True, "note": f"dry: {plans[0]}"}
    poison(q.device)
    if check.kind == "linear":
        out, _ = backend(q, k, v, captures, ())
        verdict = check_rows(spec, (q, k, v), captures, (), out, None, rows=q.shape[2])
        return {"ok": verdict.ok, "note": str(verdict)}
    grad = torch.randn_like(v.new_empty((*q.shape[:3], v.shape[3])))
    needs = [i < 3 for i in range(len(tensors))]
    return _compared(spec, grad, tensors, Gradients(spec, backend, None).run(grad, tensors, (), needs))


def _compared(spec: AttentionSpec, grad: Tensor, tensors: list[Tensor], found: Sequence[Tensor]) -> dict[str, Any]:
    """The gradients of q, k and v, judged."""
    needs = [i < 3 for i in range(len(tensors))]
    golden, eager = (expected(spec, grad, None, tensors, (), needs, x) for x in (torch.float64, grad.dtype))
    verdicts = [compare(g, e, x, gradients=True) for g, e, x in zip(golden, eager, found, strict=True)]
    wrong = [f"d{name}: {v}" for name, v in zip("qkv", verdicts, strict=True) if not v.ok]
    return {"ok": not wrong, "note": "; ".join(wrong) or str(verdicts[0])}


def poison(device: Any) -> None:
    """Fill memory that is free with NaN: what a kernel leaves out of its results shows."""
    blocks = [torch.full((n,), torch.nan, device=device) for n in (_POISON, *([1 << 18] * 16))]
    del blocks


def work(check: Check, chip: str) -> dict[str, Any]:
    """The verdict of one call on the chip of this name, here."""
    return judged(check, CHIPS[chip], True)


def warm(row: Any, plan: TritonPlan, chip: str) -> dict[str, Any]:
    """Compile a plan of a row of the table, so that Triton's cache on disk has it, by running it once."""
    from gpu_parts.table import run_plan

    return run_plan(row, plan, CHIPS[chip])
