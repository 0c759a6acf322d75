"""The generated Triton kernels of a linear attention as a backend, and as sums that `torch.autograd` differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt import dump
from attnopt.analysis.linear_form import LinearForm
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_linear import emit_linear, linear_plans, scales_queries, supported_linear
from attnopt.codegen.triton_plans import Chip
from attnopt.errors import AttnoptError, CacheError, CompileError
from attnopt.options import Options
from attnopt.runtime.build import Warn
from attnopt.runtime.inputs import dtype_name
from attnopt.runtime.linear_factors import Factors, factors
from attnopt.runtime.triton_binaries import Binary, read
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_launch import chip_of, far, on, usual
from attnopt.runtime.triton_load import load
from attnopt.spec import AttentionSpec


class TritonLinear:
    """Launches the first of the kernels that fits, or what `attnopt aot` compiled of it; `name` is for the report."""

    name = "triton linear"

    def __init__(
        self,
        spec: AttentionSpec,
        form: LinearForm,
        chip: Chip,
        kernels: Sequence[TritonKernel],
        ready: Sequence[Binary] = (),
    ) -> None:
        self.spec, self.form, self.chip, self.kernels = spec, form, chip, list(kernels)
        self.ready = {binary.entry: binary for binary in ready}
        self.restored: dict[str, Any] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], total: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The attention, and with `total` the sum of each row's weights `[B, H, n_q]` in fp32."""
        made = self.factors(q, k, captures, scalars)
        out, sums = self._launch("linear", (q, k, v), scalars, made, gate=made.gate)
        return out, sums if total else None

    def factors(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Factors:
        """What the kernels take beside q, k and v: all of it in fp32, and by query also what `offset` comes to."""
        made = factors(self.spec, self.form, q, k, captures, scalars)
        by_query, rate = made.by_query, made.rate
        if scales_queries(self.form):
            # Kernels count places of keys: exp(rate (q - k)) is exp(rate (place(q) - k)) exp(-rate offset).
            shift = 1.0 if rate is None else torch.exp(-rate * made.offset)[..., None]
            shape = (q.shape[0], q.shape[1], q.shape[2])
            one = torch.ones(1, 1, 1, dtype=torch.float64, device=q.device) if by_query is None else by_query.double()
            by_query = (one * shift).float().expand(shape)
        return Factors(made.by_key, by_query, made.gate, None if rate is None else rate.float(), made.offset)

    def sums(self, q: Tensor, k: Tensor, v: Tensor, scalars: Sequence[int], made: Factors) -> tuple[Tensor, Tensor]:
        """`(sum_k w v [B, H, n_q, d_v], sum_k w [B, H, n_q])` in fp32, differentiable by q, k and v."""
        return _Sums.apply(q, k, v, self, scalars, made)  # type: ignore[no-any-return, no-untyped-call]

    def _launch(
        self, name: str, tensors: tuple[Tensor, ...], scalars: Sequence[int], made: Factors, **more: Any
    ) -> Any:
        problem = far(*tensors[:3], scalars, max(x.plan.block_n for x in self.kernels))
        if problem:
            raise CompileError(problem)
        about = {"by_key": made.by_key, "by_query": made.by_query, "rate": made.rate, "offset": made.offset}
        about |= {"processors": self.chip.processors, **more}
        with on(tensors[0].device):
            if self.ready and usual(*tensors[:3], ()) and tensors[0].shape[3] % 16 == 0:
                about["kernels"] = self._restored()
                return launch([next(iter(self.ready.values())).kernel], tensors, about, name)
            return launch(self.kernels, tensors, about, name)

    def _restored(self) -> dict[str, Any]:
        if not self.restored:
            self.restored = {entry: binary.restore() for entry, binary in self.ready.items()}
        return self.restored


class _Sums(torch.autograd.Function):
    """The sums of a linear attention, and their gradients by kernels."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, backend: TritonLinear, scalars: Sequence[int], made: Factors
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.given = backend, scalars, made
        found: tuple[Tensor, Tensor] = backend._launch("linear", (q, k, v), scalars, made, raw=True)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
        backend, scalars, made = ctx.given
        q, k, v = ctx.saved_tensors
        if q.dtype == torch.float16:  # small where many weights were divided by: moved to where fp16 has digits
            top = torch.maximum(grad.abs().amax(), torch.finfo(torch.float32).tiny * torch.ones_like(grad[0, 0, 0, 0]))
            scale = torch.exp2(6 - top.log2().ceil()).clamp(max=2.0**100)
            grad, dtotal = grad * scale, dtotal * scale
        given = (q, k, v, grad.to(q.dtype), dtotal.contiguous())
        found = backend._launch("linear_backward", given, scalars, made)
        if q.dtype == torch.float16:
            found = tuple(x / scale for x in found)
        dq, dk, dv = found
        heads = backend.spec.heads
        dk, dv = gathered(dk, heads.k_map, heads.k), gathered(dv, heads.v_map, heads.v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def gathered(x: Tensor, table: Sequence[int], count: int) -> Tensor:
    """`[B, Hq, n, d]` summed over the query heads of each of `count` heads."""
    if tuple(table) == tuple(range(x.shape[1])) and count == x.shape[1]:
        return x
    group = x.shape[1] // max(1, count)
    if group * count == x.shape[1] and tuple(table) == tuple(h // group for h in range(x.shape[1])):
        return x.unflatten(1, (count, group)).sum(2)
    parts = [[h for h, head in enumerate(table) if head == one] for one in range(count)]
    return torch.stack([sum((x[:, h] for h in part), torch.zeros_like(x[:, 0])) for part in parts], 1)


def build(spec: AttentionSpec, form: LinearForm, q: Tensor, options: Options, warn: Warn) -> TritonLinear | None:
    """The backend for these inputs; None, and a warning with the reason, where there is none."""
    layout = Layout(dtype_name(q.dtype))
    if layout.dtype == "float64":
        return None
    try:
        problem = supported_linear(spec, layout, form)
        if problem is not None:
            raise CompileError(problem)
        chip = chip_of(q.device)
        plans = linear_plans(chip, layout.dtype, spec.heads.d_qk, spec.heads.d_v)
        kernels = [emit_linear(spec, layout, plan) for plan in plans]
        load(kernels[0])  # says now, not at the first call, that there is no Triton
        dump.kernel(options.dump, f"{spec.key[:16]}_{kernels[0].key[:8]}.py", kernels[0].source)
        return TritonLinear(spec, form, chip, kernels, _ready(spec, layout, chip, options))
    except AttnoptError as error:
        warn(f"no Triton kernel of a linear attention: {str(error).rstrip('.')}. Torch's operators run instead.")
        return None


def _ready(spec: AttentionSpec, layout: Layout, chip: Chip, options: Options) -> list[Binary]:
    if not options.aot_dir:
        return []
    wanted = (spec.key, layout, chip, "linear")
    try:
        return [
            b
            for b in read(Path(options.aot_dir))
            if (b.kernel.spec_key, b.kernel.layout, b.chip, b.kernel.kind) == wanted
        ]
    except CacheError as error:
        raise CompileError(str(error)) from error
