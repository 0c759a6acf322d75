"""Column mass and weights in eager PyTorch: the definition, the fallback, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.runtime.gradient import recording
from attnopt.runtime.reference import Sample
from attnopt.runtime.weights import filled_weights
from attnopt.spec import AttentionSpec

# Weights that live at a time while columns are summed up.
_AT_ONCE = 1 << 22


def defined(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str,
    compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`column_mass [B, Hq, n_k]` or `weights [B, Hq, n_q, n_k]` in the dtype of the computation. Differentiable.

    All weights live at once; `economical` is the same with few of them.
    """
    made = filled_weights(spec, q, k, captures, scalars, compute=compute)
    return made if name == "weights" else made.sum(-2)


def economical(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str
) -> Tensor:
    """As `defined`, without gradients; column mass is summed up by some rows at a time, in their order."""
    if name == "weights":
        return defined(spec, q, k, captures, scalars, name)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = torch.zeros((*q.shape[:2], k.shape[2]), dtype=wide, device=q.device)
    step = max(1, _AT_ONCE // max(1, total.numel()))
    for first in range(0, q.shape[2], step):
        rows = torch.arange(first, min(first + step, q.shape[2]), device=q.device)
        total += filled_weights(spec, q, k, captures, scalars, Sample(rows=rows)).sum(-2)
    return total


def side_gradients(
    spec: AttentionSpec, grad: Tensor, tensors: Sequence[Tensor], scalars: Sequence[int], name: str,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors (q, k, captures...) that `needs` marks, in their dtypes, through the definition."""
    leaves = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs, strict=True)]
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    if not wanted:
        return []
    q, k, *captures = leaves
    with recording(q.device.type):
        made = defined(spec, q, k, captures, scalars, name)
    found = torch.autograd.grad(made, wanted, grad.to(made.dtype), allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in found]
