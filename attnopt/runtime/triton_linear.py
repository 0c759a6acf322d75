"""The generated Triton kernels of a linear attention as a backend, and as sums that `torch.autograd` differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt import dump
from attnopt.analysis.linear_form import LinearForm
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_linear import emit_linear, linear_plans, scales_queries, supported_linear
from attnopt.codegen.triton_plans import Chip
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime.build import Warn
from attnopt.runtime.inputs import dtype_name
from attnopt.runtime.linear_factors import Factors, factors
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_launch import chip_of, far, on
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
        ahead: Ahead | None = None,
    ) -> None:
        self.spec, self.form, self.chip, self.ahead = spec, form, chip, ahead or Ahead(chip, None)
        self.kernels = self.ahead.first(kernels)

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
        return replace(made, by_query=by_query, rate=None if rate is None else rate.float())

    def sums(self, q: Tensor, k: Tensor, v: Tensor, scalars: Sequence[int], made: Factors) -> tuple[Tensor, Tensor]:
        """`(sum_k w v [B, H, n_q, d_v], sum_k w [B, H, n_q])` in fp32, differentiable by q, k, v and the factors."""
        by_query = made.by_query
        if by_query is None or not by_query.requires_grad:
            return _Sums.apply(q, k, v, *_learned(made), self, scalars, made)  # type: ignore[no-any-return, no-untyped-call]
        fixed = replace(made, by_query=torch.ones_like(by_query[:1, :1, :1]))
        found, total = _Sums.apply(q, k, v, *_learned(made), self, scalars, fixed)  # type: ignore[no-untyped-call]
        return found * by_query.unsqueeze(-1), total * by_query

    def _launch(
        self, name: str, tensors: tuple[Tensor, ...], scalars: Sequence[int], made: Factors, **more: Any
    ) -> Any:
        problem = far(*tensors[:3], scalars, max(x.plan.block_n for x in self.kernels))
        if problem:
            raise CompileError(problem)
        about = {"by_key": made.by_key, "by_query": made.by_query, "rate": made.rate, "offset": made.offset}
        if made.line is not None:
            about["line"] = *made.line, made.line[1].cummin(-1).values
        about |= {"processors": self.chip.processors, **more}
        with on(tensors[0].device):
            return launch(self.kernels, tensors, about, name, self.ahead.module)


def _learned(made: Factors) -> tuple[Tensor | None, ...]:
    """What the gradient of sums may be asked for beside q, k and v."""
    return made.by_key, made.rate, *(made.line or (None, None))


class _Sums(torch.autograd.Function):
    """The sums of a linear attention, and their gradients by kernels."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, backend, scalars, made = given
        ctx.save_for_backward(*tensors)
        ctx.given = backend, scalars, made
        found: tuple[Tensor, Tensor] = backend._launch("linear", tuple(tensors[:3]), scalars, made, raw=True)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
        backend, scalars, made = ctx.given
        q, k, v, by_key, rate, *_ = ctx.saved_tensors
        scale = None
        if q.dtype == torch.float16:  # small where many weights were divided by: moved to where fp16 has digits
            top = torch.maximum(grad.abs().amax(), torch.finfo(torch.float32).tiny * torch.ones_like(grad[0, 0, 0, 0]))
            scale = torch.exp2(6 - top.log2().ceil()).clamp(max=2.0**100)
            grad, dtotal = grad * scale, dtotal * scale
        given = (q, k, v, grad.to(q.dtype), dtotal.contiguous())
        by_key_needed, by_rate, by_line_q, by_line_k = ctx.needs_input_grad[3:7]
        own = {"own_key": torch.ones_like(by_key[:1, :1, :1])} if by_key_needed else {}
        found = list(backend._launch("linear_backward", given, scalars, made, **own))
        if by_rate:
            found.append(backend._launch("linear_backward_rate", given, scalars, made).sum_to_size(rate.shape))
        dq, dk, dv, *drate = found if scale is None else [x / scale for x in found]
        heads, factors = backend.spec.heads, [None, *(drate or [None]), None, None]
        keys = k[:, list(heads.k_map)].float() if by_key_needed or by_line_k else None
        if by_key_needed:
            factors[0] = (keys * dk).sum(-1)
            dk, dv = dk * by_key.unsqueeze(-1), dv * by_key.unsqueeze(-1)
        # A pair's weight grows with the line at the query as it does with the query itself.
        factors[2] = (q.float() * dq).sum(-1) if by_line_q else None
        factors[3] = -(keys * dk).sum(-1) if by_line_k else None
        dk, dv = gathered(dk, heads.k_map, heads.k), gathered(dv, heads.v_map, heads.v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *factors, None, None, None


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
        return TritonLinear(spec, form, chip, kernels, Ahead(chip, options, warn))
    except AttnoptError as error:
        warn(f"no Triton kernel of a linear attention: {str(error).rstrip('.')}. Torch's operators run instead.")
        return None
