"""The graph-visible operator `attnopt::attention_side`: column mass and weights, made of scores once more."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.chosen import lowered
from attnopt.analysis.plain import weights_of
from attnopt.errors import ShapeError
from attnopt.returns import PAIRS
from attnopt.runtime import dispatch
from attnopt.runtime.inputs import check_inputs
from attnopt.runtime.op import loop
from attnopt.runtime.pairs import defined, economical, side_gradients
from attnopt.runtime.shortcut import transformed
from attnopt.runtime.side_kernels import by_kernel
from attnopt.runtime.triton_select import choice
from attnopt.spec import AttentionSpec

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "attention_side(Tensor q, Tensor k, Tensor rows, Tensor[] captures, SymInt[] scalars, str spec, str name) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_side_backward(Tensor grad, Tensor q, Tensor k, Tensor[] captures, SymInt[] scalars, str spec, "
    "str name, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OPERATOR = torch.ops.attnopt.attention_side.default
_BACKWARD = torch.ops.attnopt.attention_side_backward.default


def side(
    spec: AttentionSpec,
    name: str,
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
) -> Tensor:
    """`column_mass [B, Hq, n_k]` in fp32, or `weights [B, Hq, n_q, n_k]` in q's dtype.

    Args:
        spec: what to compute, without side outputs.
        name: `column_mass` or `weights`.
        q, k, captures, scalars: as for the attention.
        rows: `[B, Hq, n_q, 2]` in fp32: `max` and `log_sum` of the attention with the same inputs. It carries no
            gradient: that of the weights is the one of q, k and captures. Empty for a normaliser that is no softmax.
    """
    return OPERATOR(q, k, rows, list(captures), list(scalars), spec.text, name)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> AttentionSpec:
    return AttentionSpec.parse(text)


def _whole(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: list[Tensor], scalars: list[int]
) -> tuple[AttentionSpec, list[Tensor]]:
    """The spec and its captures where a choice of blocks is a mask."""
    if spec.select is None:
        return spec, captures
    active = dispatch.current()
    return lowered(spec), [*captures, choice(spec, q, k, captures, scalars, active.options, active.warn)]


def _forward(
    q: Tensor, k: Tensor, rows: Tensor, captures: list[Tensor], scalars: list[int], spec: str, name: str
) -> Tensor:
    known = _parsed(spec)
    if name not in PAIRS:
        raise ShapeError(f"{name!r} is no side output that is made of pairs; there are {', '.join(PAIRS)}.")
    # Of values, only the width is known to the spec.
    values = k.new_empty(1).expand(k.shape[0], known.heads.v, k.shape[2], known.heads.d_v)
    check_inputs(known, q, k, values, captures, scalars)
    known, captures = _whole(known, q, k, captures, scalars)
    active = dispatch.current()
    found = by_kernel(weights_of(known), q, k, rows, captures, scalars, name, active.options, active.warn)
    if found is not None:
        return found
    with torch.no_grad():
        made = economical(known, q, k, captures, scalars, name)
    return made.to(q.dtype if name == "weights" else torch.float32).contiguous()


_LIBRARY.impl("attention_side", _forward, "CPU")
_LIBRARY.impl("attention_side", _forward, "CUDA")


@torch.library.register_fake("attnopt::attention_side", lib=_LIBRARY)
def _fake(
    q: Tensor, k: Tensor, rows: Tensor, captures: list[Tensor], scalars: list[int], spec: str, name: str
) -> Tensor:
    batch, heads, n_q, _ = q.shape
    if name == "weights":
        return q.new_empty((batch, heads, n_q, k.shape[2]))
    return q.new_empty((batch, heads, k.shape[2]), dtype=torch.float32)


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, captures: list[Tensor], scalars: list[int], spec: str, name: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    known, given = _whole(_parsed(spec), q, k, captures, scalars)
    needs = [*needs[:2], *needs[2:], *[False] * (len(given) - len(captures))]
    return side_gradients(known, grad, (q, k, *given), scalars, name, needs)


_LIBRARY.impl("attention_side_backward", _run_backward, "CPU")
_LIBRARY.impl("attention_side_backward", _run_backward, "CUDA")


@torch.library.register_fake("attnopt::attention_side_backward", lib=_LIBRARY)
def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, captures: list[Tensor], scalars: list[int], spec: str, name: str,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, needed in zip((q, k, *captures), needs, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, captures, ctx.scalars, ctx.spec, ctx.name = inputs
    ctx.save_for_backward(q, k, *captures)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, *captures = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], *(ctx.needs_input_grad[3] or [])]
    found = iter(_BACKWARD(grad, q, k, captures, ctx.scalars, ctx.spec, ctx.name, needs))
    grads = [next(found) if needed else None for needed in needs]
    return (*grads[:2], None, grads[2:], None if ctx.scalars else [], None, None)


torch.library.register_autograd("attnopt::attention_side", _backward, setup_context=_setup_context, lib=_LIBRARY)


class _Recorded(torch.autograd.Function):
    """The operator below the autograd keys, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, rows: Tensor, scalars: list[int], spec: str, name: str, *captures: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, *captures)
        ctx.given = list(scalars), spec, name
        with torch._C._AutoDispatchBelowAutograd():
            return OPERATOR(q, k, rows, list(captures), list(scalars), spec, name)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        needs, (q, k, *captures) = ctx.needs_input_grad, ctx.saved_tensors
        needs = [*needs[:2], *needs[6:]]
        found = iter(_BACKWARD(grad, q, k, captures, *ctx.given, needs))
        grads = [next(found) if needed else None for needed in needs]
        return (*grads[:2], None, None, None, None, *grads[2:])


def _entry(
    q: Tensor, k: Tensor, rows: Tensor, captures: list[Tensor], scalars: list[int], spec: str, name: str
) -> Tensor:
    """Derivatives that are taken forward, or by a transform of `torch.func`, are those of the definition."""
    if transformed():
        known, captures = _whole(_parsed(spec), q, k, captures, scalars)
        return defined(known, q, k, captures, scalars, name).to(q.dtype if name == "weights" else torch.float32)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, *captures)):
        return _Recorded.apply(q, k, rows, scalars, spec, name, *captures)  # type: ignore[no-any-return,no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return OPERATOR(q, k, rows, captures, scalars, spec, name)  # type: ignore[no-any-return]


for _key in ("AutogradCPU", "AutogradCUDA"):
    _LIBRARY.impl("attention_side", _entry, _key)


@torch.library.register_vmap("attnopt::attention_side", lib=_LIBRARY)
def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    return loop(_single, info.batch_size, in_dims, args)[0][0], 0


def _single(*args: Any) -> tuple[Tensor]:
    return (OPERATOR(*args),)


def _register_autocast(device: str, key: str) -> None:
    """As for the attention: q and k run in the dtype of autocast."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k)]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return OPERATOR(*cast, *rest)  # type: ignore[no-any-return]

    _LIBRARY.impl("attention_side", autocast, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
