"""Gradients of an attention: by torch's fused ones where they are of it, else through the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnopt.analysis.mixed_form import mixed_form
from attnopt.errors import AttnoptError
from attnopt.runtime import linear, mixed
from attnopt.runtime.reference import Sample, reference
from attnopt.runtime.sdpa import Sdpa, sdpa_scale
from attnopt.spec import AttentionSpec


def gradients(
    spec: AttentionSpec,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the tensors (q, k, v, captures...) that `needs` marks, contiguous and in their dtypes.

    The scores of one batch entry live at a time. A dropout mask is drawn for the whole, so there all entries do.
    """
    q = tensors[0]
    if grad_lse is None and _sdpa_pays(spec, tensors):
        return _through_sdpa(spec, grad_out, tensors, needs)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    totals = [
        torch.zeros(t.shape, dtype=wide, device=t.device) if needed else None
        for t, needed in zip(tensors, needs, strict=True)
    ]
    if q.shape[0] and any(needs):
        whole = [torch.arange(q.shape[0], device=q.device)] if spec.dropout else []
        for batch in whole or torch.arange(q.shape[0], device=q.device).split(1):
            _accumulate(spec, grad_out, grad_lse, tensors, scalars, needs, batch, totals)
    return [total.to(t.dtype) for t, total in zip(tensors, totals, strict=True) if total is not None]


_FEW_SCORES = 64 * 64


def _sdpa_pays(spec: AttentionSpec, tensors: Sequence[Tensor]) -> bool:
    """Whether torch has a fused gradient of the spec: linear in memory, and several times as fast as the reference."""
    q, k, v = tensors[:3]
    same_width = q.shape[3] == v.shape[3]
    usable = q.device.type == "cpu" and q.dtype != torch.float64 and 0 not in (*q.shape, k.shape[2])
    # On a few scores it is no faster, and its errors are up to twice those of the plain formulas.
    large = tensors[0].shape[2] * tensors[1].shape[2] >= _FEW_SCORES
    return usable and same_width and large and sdpa_scale(spec) is not None


def _through_sdpa(
    spec: AttentionSpec, grad_out: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """In fp32 throughout: products of 16-bit tensors are slow where the processor has none."""
    leaves = [t.detach().to(torch.float32).requires_grad_(n) for t, n in zip(tensors[:3], needs[:3], strict=True)]
    wanted = [leaf for leaf, needed in zip(leaves, needs[:3], strict=True) if needed]
    with recording("cpu"):
        out, _ = Sdpa(spec)(leaves[0], leaves[1], leaves[2], (), ())
    found = torch.autograd.grad(out, wanted, grad_out.to(out.dtype)) if wanted else ()
    return [g.to(tensors[0].dtype).contiguous() for g in found]


@contextlib.contextmanager
def recording(device: str) -> Iterator[None]:
    """Record gradients although this runs inside an operator, below the autograd keys, and without autocast."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    guard = torch._C._ForceDispatchKeyGuard(included, excluded)
    with guard, torch.enable_grad(), torch.autocast(device, enabled=False):
        yield


def _accumulate(
    spec: AttentionSpec,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    batch: Tensor,
    totals: list[Tensor | None],
) -> None:
    first, count = int(batch[0]), batch.numel()
    leaves = [
        (t.narrow(0, first, count) if place < 3 else t).detach().requires_grad_(needed)
        for place, (t, needed) in enumerate(zip(tensors, needs, strict=True))
    ]
    q, k, v, *captures = leaves
    with recording(q.device.type):
        sample = Sample(batch=batch, whole_batch=tensors[0].shape[0])
        # Where a row is divided by its sum, the gradients of the two cancel: digits that fp32 does not have.
        wide = torch.float64 if q.device.type == "cpu" else None
        cheap, parts = linear.chosen(spec, q, k), mixed_form(spec)
        if cheap is not None:
            results = linear.linear(spec, cheap.form, q, k, v, captures, scalars, sample, wide), q.new_empty(0)
        elif parts is not None and k.shape[2]:
            results = mixed.chunked(spec, parts, q, k, v, captures, scalars, sample, wide), q.new_empty(0)
        else:
            results = reference(spec, q, k, v, captures, scalars, sample=sample)
    pairs = [
        (result, given.narrow(0, first, count).to(result.dtype))
        for result, given in zip(results, (grad_out, grad_lse), strict=True)
        if given is not None and result.requires_grad
    ]
    if not pairs:
        if k.shape[2]:
            raise AttnoptError("the gradient of an attention was not recorded; run this part with the original model.")
        return
    outputs, weights = zip(*pairs, strict=True)
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
    for place, (total, needed) in enumerate(zip(totals, needs, strict=True)):
        gradient = next(found) if needed else None
        if total is not None and gradient is not None:
            (total.narrow(0, first, count) if place < 3 else total).add_(gradient)


def expected(
    spec: AttentionSpec,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    work: torch.dtype,
) -> list[Tensor]:
    """The gradients that `needs` marks, through the reference, computed in `work`."""
    wide = work == torch.float64  # gradients of captures are sums in their own dtype
    leaves = [
        (t.detach().to(work) if place < 3 or (wide and t.is_floating_point()) else t.detach())
        .clone()
        .requires_grad_(needed)
        for place, (t, needed) in enumerate(zip(tensors, needs, strict=True))
    ]
    q, k, v, *captures = leaves
    with recording(q.device.type):
        results = reference(spec, q, k, v, captures, scalars, compute=work)
    pairs = [
        (r, g.to(r.dtype)) for r, g in zip(results, (grad, dlse), strict=True) if g is not None and r.requires_grad
    ]
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True))


def telling(grad: Tensor) -> Tensor:
    """A gradient to judge kernels with: the given one, or a drawn one of its shape where the given says too little.

    Of a row without a gradient every kernel is right, and beside an overflow none is: a mask leaves out keys, and
    with them the NaN of zero times infinity. Loss scaling overflows in its first steps by design.
    """
    rows = grad if grad.dim() == 3 else grad.abs().amax(-1)
    if bool(grad.isfinite().all()) and bool((rows != 0).all()):
        return grad
    drawn = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(grad.device, grad.dtype)
