"""Normalised weights in eager PyTorch: for what looks at them, and as the definition of side outputs."""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.reference import (
    _NORMALISE,
    Sample,
    _fill_weights,
    _heads,
    _products,
    _scope,
    _take,
    _without_scores,
)
from attnopt.spec import AttentionSpec


def weights(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor] = (),
    scalars: Sequence[int] = (), sample: Sample | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The normalised weights of a spec with one term, which of them `keep` allows, and the scores `q . k`.

    Each `[B, Hq, rows, n_k]`; weights of an empty row are zero. Inputs as for `reference`, where q and k of a
    `sample` with `whole_batch` hold only its batch entries.
    """
    found, _, scope, products = _normalised(spec, q, k, captures, scalars, sample or Sample())
    kept = evaluate(spec.keep, _without_scores(scope)).expand(products.shape)
    return found, kept, products


def filled_weights(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor] = (),
    scalars: Sequence[int] = (), sample: Sample | None = None, compute: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """The normalised weights `[B, Hq, rows, n_k]` in the dtype of the computation, differentiable; rows without keys
    as the policy has them, rows that are not computed zero. Inputs as for `weights`.
    """
    found, empty, scope, _ = _normalised(spec, q, k, captures, scalars, sample or Sample(), compute)
    if k.shape[2]:
        found = _fill_weights(spec.empty_row, found, empty)
    if spec.rows != sp.true:
        found = torch.where(evaluate(spec.rows, _without_scores(scope)), found, torch.zeros_like(found))
    return found


def _normalised(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor], scalars: Sequence[int],
    sample: Sample, compute: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Scope, torch.Tensor]:  # fmt: skip
    """Weights, the mask of empty rows, the scope and the products `q . k`."""
    work = compute or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    scope = _scope(spec, q, k, captures, scalars, sample, work)
    heads = scope.axes[ex.h]
    rows = _take(_take(q, 1, sample.heads), 2, sample.rows).to(work)
    k_heads = _heads(k, spec.heads.k_map, heads, sample.heads is None).to(work)
    products = _products(spec, scope, rows, k_heads)
    shape = tuple(products.shape)
    if not k.shape[2]:
        return products, torch.ones(*shape[:-1], 1, dtype=torch.bool, device=q.device), scope, products
    found, _, empty = _NORMALISE[type(spec.normalizer)](spec, scope, products, shape)
    return found, empty, scope, products
