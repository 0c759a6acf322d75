"""The sums of a linear attention by C++ kernels, differentiable: each gradient is a linear attention of its own.

See `codegen/cpp_linear`. Products are fp32 and states are summed in fp64, whatever the inputs are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt import dump
from attnopt.analysis.linear_form import LinearForm
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_linear import emit_linear, plain_sums
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.runtime.build import Warn, build_kernel
from attnopt.runtime.compile import Library, vector_lanes
from attnopt.runtime.linear_factors import Factors, factors
from attnopt.runtime.linear_native import launch
from attnopt.runtime.triton_linear import gathered
from attnopt.spec import AttentionSpec

# Values of a head whose median is taken from all of them.
_SOME = 64


class NativeSums:
    """Loaded kernels: `forward` with features of q and k as depth, `backward` with values as depth.

    `timed` makes the one for gradients of rates: `forward` with every weight times its distance.
    """

    name = "cpp linear"

    def __init__(
        self, spec: AttentionSpec, form: LinearForm, forward: Library, backward: Library, timed: Callable[[], Library]
    ) -> None:
        self.spec, self.form, self.forward, self.backward, self.timed = spec, form, forward, backward, timed

    def factors(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Factors:
        """What the kernels take beside q, k and v."""
        return factors(self.spec, self.form, q, k, captures, scalars)

    def pulled(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, made: Factors) -> tuple[Tensor, Tensor]:
        """`(grad . sum_k w v, sum_k w)` in fp64 `[B, H, n_q, 1]` each, differentiable by q, k, v and factors.

        What follows the sums multiplies a row of values by one number. So the gradient of a function of both is all
        that is needed of it, and no tensor of the size of the result is made in fp64.
        """
        by_query = made.by_query
        if by_query is None or not by_query.requires_grad:
            return _Pulled.apply(q, k, v, grad, *_learned(made), self, made)  # type: ignore[no-any-return, no-untyped-call]
        fixed = replace(made, by_query=None)
        found, total = _Pulled.apply(q, k, v, grad, *_learned(made), self, fixed)  # type: ignore[no-untyped-call]
        factor = by_query.unsqueeze(-1).double()
        return found * factor, total * factor


class _Pulled(torch.autograd.Function):
    """The sums of a linear attention, those of values times a gradient, and their gradients by kernels.

    Values are taken from a middle one of their head: then neither the gradient of the sum of weights nor the states
    are large numbers whose difference is looked for.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        q, k, v, grad, *_, backend, made = given
        heads, middle = backend.spec.heads, _middle(v)
        made = _raw(made)
        found, total = _empty(q, q.shape[2], v.shape[3]), torch.empty(q.shape[:3], dtype=torch.float32)
        keys, values = _spread(k, heads.k_map), _spread(v - middle, heads.v_map)
        launch(backend.forward, (_rows(q), keys, values), made, found, total)
        moved = (grad * _spread(middle, heads.v_map)).sum(-1, keepdim=True).double()
        ctx.save_for_backward(q, keys, values, grad, moved)
        ctx.given = backend, made
        sums = total.double().unsqueeze(-1)
        return (grad * found).sum(-1, keepdim=True).double() + sums * moved, sums

    @staticmethod
    def backward(ctx: Any, dpulled: Tensor, dtotal: Tensor) -> tuple[Any, ...]:
        backend, made = ctx.given
        q, keys, values, grad, moved = ctx.saved_tensors
        heads, ahead = backend.spec.heads, q.shape[2] - keys.shape[2]
        dtotal = (dtotal + dpulled * moved).float()
        q, grad = _rows(q), _rows(grad * dpulled.float())
        line = None if made.line is None else (-made.line[1], -made.line[0])
        swapped = Factors(made.by_query, made.by_key, None, made.rate, made.offset + ahead, line)
        needs_q, needs_k, needs_v, _, by_key, by_rate, by_line_q, by_line_k, *_ = ctx.needs_input_grad
        dq = dk = dv = None
        factors: list[Tensor | None] = [None] * 4
        # A value of one makes the sum of the weights.
        ones = torch.cat([values, values.new_ones(1).expand(*values.shape[:3], 1)], -1)
        pull = torch.cat([grad, dtotal], -1)
        if needs_q or by_line_q:
            dq = _empty(q, q.shape[2], q.shape[3])
            launch(backend.backward, (pull, ones, keys), made, dq)
            factors[2] = (q * dq).sum(-1) if by_line_q else None
        if needs_k or by_key or by_line_k:
            dk = _empty(q, keys.shape[2], keys.shape[3])
            raw = replace(swapped, by_query=None) if by_key else swapped
            launch(backend.backward, (ones, pull, q), raw, dk, reverse=True, ahead=ahead)
            if by_key:
                factors[0] = (keys * dk).sum(-1)
                dk = dk * made.by_key.unsqueeze(-1)
            factors[3] = -(keys * dk).sum(-1) if by_line_k else None
            dk = gathered(dk, heads.k_map, heads.k)
        if needs_v:
            dv = _empty(q, keys.shape[2], grad.shape[3])
            launch(backend.forward, (keys, q, grad), swapped, dv, reverse=True, ahead=ahead)
            dv = gathered(dv, heads.v_map, heads.v)
        if by_rate:
            factors[1] = _by_rate(backend.timed(), (q, keys, values), grad, dtotal, made)
        return dq if needs_q else None, dk if needs_k else None, dv, None, *factors, None, None


def _by_rate(
    timed: Library, tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor, dtotal: Tensor, made: Factors
) -> Tensor:
    """The gradient of the rates, from sums in which every weight is multiplied by its distance."""
    q = tensors[0]
    found, total = _empty(q, *grad.shape[2:]), torch.empty(q.shape[:3], dtype=torch.float32)
    launch(timed, tensors, made, found, total)
    each = (grad * found).sum((2, 3), dtype=torch.float64) + (dtotal[..., 0] * total).sum(2, dtype=torch.float64)
    assert made.rate is not None
    return each.sum_to_size(made.rate.shape)


def _learned(made: Factors) -> tuple[Tensor | None, ...]:
    """What the gradient of sums may be asked for beside q, k and v."""
    return made.by_key, made.rate, *(made.line or (None, None))


def _middle(v: Tensor) -> Tensor:
    """A value amid those of each head, `[B, Hv, 1, d_v]`: the median of some, which a few large ones do not move."""
    few = v[:, :, :: max(1, v.shape[2] // _SOME)]
    return few.median(2, keepdim=True).values.nan_to_num(0.0, 0.0, 0.0)


def _raw(made: Factors) -> Factors:
    """Without the gate, and apart from how the factors were made."""
    cut = [None if x is None else x.detach() for x in (made.by_key, made.by_query, made.rate)]
    line = None if made.line is None else (made.line[0].detach(), made.line[1].detach())
    return Factors(cut[0], cut[1], None, cut[2], made.offset, line)


def _empty(q: Tensor, rows: int, width: int) -> Tensor:
    return torch.empty((*q.shape[:2], rows, width), dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """As fp32 with contiguous rows."""
    x = x.to(torch.float32)
    return x if x.stride(3) == 1 else x.contiguous()


def _spread(x: Tensor, table: Sequence[int]) -> Tensor:
    """The key or value head of every query head."""
    if tuple(table) == tuple(range(x.shape[1])):
        return _rows(x)
    if x.shape[1] == 1:
        return _rows(x).expand(-1, len(table), -1, -1)
    return _rows(x)[:, list(table)]


def build_sums(spec: AttentionSpec, form: LinearForm, options: Options, warn: Warn) -> NativeSums | None:
    """The kernels for a spec with a linear form; None, and a warning with the reason, where there are none."""
    heads, layout = spec.heads, Layout("float32")

    def made(depth: int, width: int, timed: bool = False) -> Library:
        kernel = emit_linear(plain_sums(form, heads.q, depth, width), form, layout, vector_lanes(), timed)
        dump.kernel(options.dump, f"{kernel.spec_key[:16]}_{kernel.key[:8]}.cpp", kernel.source)
        return build_kernel(kernel, options, warn, spec.text)

    try:
        both = made(heads.d_qk, heads.d_v), made(heads.d_v + 1, heads.d_qk)
        return NativeSums(spec, form, *both, functools.cache(lambda: made(heads.d_qk, heads.d_v, True)))
    except AttnoptError as error:
        warn(f"no C++ gradients of a linear attention: {str(error).rstrip('.')}. Torch's operators run instead.")
        return None
