"""The graph-visible operator `attnopt::attention` and its fake, autograd, vmap and autocast rules."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.chosen import lowered
from attnopt.errors import AttnoptError
from attnopt.returns import of_rows
from attnopt.runtime import cpp_gradient, dispatch, linear_gradient, quick, triton_gradient, triton_launch
from attnopt.runtime.direct import direct
from attnopt.runtime.gradient import gradients
from attnopt.runtime.inputs import check_inputs
from attnopt.runtime.reference import reference
from attnopt.runtime.seed import seeded
from attnopt.runtime.shortcut import register_shortcut
from attnopt.runtime.statistics import folded
from attnopt.runtime.triton_select import choice
from attnopt.spec import AttentionSpec

_LIBRARY = torch.library.Library("attnopt", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] scalars, str spec) "
    "-> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor[] captures, "
    "SymInt[] scalars, str spec, bool[] needs, Tensor? out=None, Tensor? lse=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_FORWARD = torch.ops.attnopt.attention.default
_BACKWARD = torch.ops.attnopt.attention_backward.default


def attention(
    spec: AttentionSpec | str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the attention that `spec` describes, by the best kernel that works here.

    Args:
        spec: the spec or its text.
        q: `[B, Hq, n_q, d_qk]`; k: `[B, Hk, n_k, d_qk]`; v: `[B, Hv, n_k, d_v]`; of one floating dtype and device.
        captures: one tensor for each of the spec's captures, in order.
        scalars: one integer for each of the spec's scalars; with dropout one more, the seed of the mask (which may
            instead follow the captures as an int64 scalar tensor).

    Returns:
        `out [B, Hq, n_q, d_v]`, a transposed view of a contiguous `[B, n_q, Hq, d_v]`; `lse [B, Hq, n_q]` in fp32
        if the spec returns it, else an empty tensor. Where it returns other side outputs of rows (`returns.py`), they
        stand in its place, several as `[B, Hq, n_q, n]` in the spec's order.
    """
    return called(q, k, v, list(captures), list(scalars), spec if isinstance(spec, str) else spec.text)


def called(
    q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
) -> tuple[Tensor, Tensor]:
    """The operator as a function: past PyTorch's dispatcher where that has nothing to do, else through it."""
    if direct((q, k, v, *captures)):
        return _forward(q, k, v, captures, scalars, spec) if captures or scalars else quick.quick(q, k, v, spec)
    return _FORWARD(q, k, v, captures, scalars, spec)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> AttentionSpec:
    return AttentionSpec.parse(text)


# --- kernels and fakes -----------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
) -> tuple[Tensor, Tensor]:
    captures, scalars = seeded(captures, scalars, lambda: _parsed(spec))
    return dispatch.forward(q, k, v, captures, scalars, spec)


_LIBRARY.impl("attention", _forward, "CPU")
_LIBRARY.impl("attention", _forward, "CUDA")


@torch.library.register_fake("attnopt::attention", lib=_LIBRARY)
def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    out = q.new_empty((batch, rows, heads, v.shape[3])).transpose(1, 2)
    count = len(of_rows(_parsed(spec).returns))
    shape = (0,) if not count else (batch, heads, rows) if count == 1 else (batch, heads, rows, count)
    return out, q.new_empty(shape, dtype=torch.float32)


def _run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    scalars: list[int],
    spec: str,
    needs: list[bool],
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> list[Tensor]:
    """`out` and `lse`: what the forward gave, where it was kept for this."""
    captures, scalars = seeded(captures, scalars, lambda: _parsed(spec))
    site, active = _parsed(spec), dispatch.current()
    if site.select is not None:
        captures = [*captures, choice(site, q, k, captures, scalars, active.options, active.warn)]
        needs, site = [*needs[: 2 + len(captures)], False], lowered(site)
    # A seed is the last tensor, and needs no gradient.
    needs = needs[: 3 + len(captures)]
    plain, lse, grad_lse = folded(site.returns, lse, grad_lse)
    if not plain:
        return gradients(site, grad_out, grad_lse, (q, k, v, *captures), scalars, needs)
    site = replace(site, returns=("lse",)) if of_rows(site.returns) else site
    given = (site, grad_out, grad_lse, (q, k, v, *captures), scalars, needs)
    if grad_lse is None and linear_gradient.enabled(q, active.options) and linear_gradient.applies(site, q, k):
        found = linear_gradient.gradients(given[0], given[1], *given[3:], active.warn, active.options)
    elif q.is_cuda or triton_launch.runs_on(q.device, active.options):
        found = triton_gradient.gradients(*given, active.warn, active.options, (out, lse))
    else:
        found = cpp_gradient.gradients(*given, (out, lse), active.options, active.warn)
    return gradients(*given) if found is None else found


_LIBRARY.impl("attention_backward", _run_backward, "CPU")
_LIBRARY.impl("attention_backward", _run_backward, "CUDA")


@torch.library.register_fake("attnopt::attention_backward", lib=_LIBRARY)
def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    scalars: list[int],
    spec: str,
    needs: list[bool],
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> list[Tensor]:
    wanted = [t for t, needed in zip((q, k, v, *captures), needs, strict=True) if needed]
    return [t.new_empty(t.shape) for t in wanted]


# --- autograd --------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, scalars, spec = inputs
    ctx.save_for_backward(q, k, v, *captures)
    ctx.scalars, ctx.spec, ctx.kept = scalars, spec, (None, None)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, *captures = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3], *(ctx.needs_input_grad[3] or [])]
    lse = grad_lse if grad_lse is not None and grad_lse.dim() >= 3 else None
    found = iter(_BACKWARD(grad_out, lse, q, k, v, captures, ctx.scalars, ctx.spec, needs, *ctx.kept))
    grads = [next(found) if needed else None for needed in needs]
    # The result must have the pytree structure of the inputs: an empty list stays a list.
    return (*grads[:3], grads[3:], None if ctx.scalars else [], None)


def _no_double_backward(ctx: Any, grads: list[Tensor]) -> None:
    raise AttnoptError(
        "a second derivative through attnopt::attention was asked for, and it has only a first; run this part with "
        "the original model, or with attnopt.Options(disable=True)."
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    return None


torch.library.register_autograd("attnopt::attention", _backward, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd(
    "attnopt::attention_backward", _no_double_backward, setup_context=_no_context, lib=_LIBRARY
)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
) -> tuple[Tensor, Tensor]:
    """The operator in operators of PyTorch, for derivatives that kernels do not have."""
    known = _parsed(spec)
    captures, scalars = seeded(captures, scalars, lambda: known)
    check_inputs(known, q, k, v, captures, scalars)
    dispatch.current().warn(
        "forward-mode derivatives and torch.func transforms of attention are computed by the reference, which makes "
        "every score; torch.autograd takes the kernels."
    )
    out, lse = reference(known, q, k, v, captures, scalars)
    return out, lse.to(torch.float32) if of_rows(known.returns) else lse.new_empty(0, dtype=torch.float32)


def _recorded_text(spec: str, q: Tensor) -> str:
    options = dispatch.current().options
    if q.is_cuda or triton_launch.runs_on(q.device, options):
        return triton_gradient.recorded_text(spec, q, options)
    return cpp_gradient.recorded_text(spec, q.dtype, options)


register_shortcut(_LIBRARY, _FORWARD, _forward, _backward, _plain, _recorded_text)


# --- vmap ------------------------------------------------------------------------------------------


def _moved(tensor: Tensor | None, dim: int | None, count: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _mentions_batch(spec: AttentionSpec) -> bool:
    return bool(spec.dropout) or any(ex.depends(part, ex.b, ex.n_b) for part in spec.expressions.values())


@torch.library.register_vmap("attnopt::attention", lib=_LIBRARY)
def _vmap_attention(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """The mapped dimension joins the batch; a loop where captures are mapped or the batch index matters."""
    q, k, v, captures, scalars, text = args
    if any(d is not None for d in _flat(in_dims[3])) or _mentions_batch(_parsed(text)):
        return loop(_FORWARD, info.batch_size, in_dims, args)
    count = info.batch_size
    moved = [_moved(t, d, count).flatten(0, 1) for t, d in zip((q, k, v), in_dims[:3], strict=True)]  # type: ignore[union-attr]
    out, lse = _FORWARD(*moved, captures, scalars, text)
    out = out.unflatten(0, (count, -1)) if out.shape[0] else out.new_empty((count, 0, *out.shape[1:]))
    if lse.dim() == 1:
        return (out, lse), (0, None)
    empty = lse.new_empty((*out.shape[:-1], *lse.shape[3:]))
    return (out, lse.view(count, -1, *lse.shape[1:]) if lse.shape[0] else empty), (0, 0)


@torch.library.register_vmap("attnopt::attention_backward", lib=_LIBRARY)
def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return loop(_BACKWARD, info.batch_size, in_dims, args)


def _flat(dims: Any) -> list[int | None]:
    return list(dims) if isinstance(dims, (list, tuple)) else [dims]


def loop(op: Any, count: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """A mapped call of an operator, one entry after the other."""

    def pick(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list) and isinstance(dim, (list, tuple)):
            return [pick(x, d, i) for x, d in zip(value, dim, strict=True)]
        return value.select(dim, i) if dim is not None and isinstance(value, Tensor) else value

    results = [op(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(count)]
    if isinstance(results[0], list):
        return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


# --- autocast --------------------------------------------------------------------------------------


def _register_autocast(device: str, key: str) -> None:
    """Under autocast q, k and v run in its dtype, as in `scaled_dot_product_attention`.

    Captures keep theirs: a mask filled with `finfo(float32).min` would become -inf in bf16.
    """
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(
        q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            out, lse = _FORWARD(*cast, captures, scalars, spec)
            return out, lse

    _LIBRARY.impl("attention", autocast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
