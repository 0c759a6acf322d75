"""Attention with its side outputs, for what watches a model: entropy, column mass, weights, without N x N memory.

Entropy of heads guides pruning, the mass of a column which keys a cache keeps (H2O, Zhang et al., 2023; SnapKV, Li et
al., 2024). The mathematics is in `docs/side-outputs.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError, SpecError
from attnopt.returns import AGAIN, PAIRS, ROWS, of_rows
from attnopt.runtime import op
from attnopt.runtime.side import side
from attnopt.runtime.statistics import named
from attnopt.spec import AttentionSpec, Softmax

__all__ = ["Attention", "attention"]

_ASKED = ("lse", "entropy", *PAIRS)


class Attention(NamedTuple):
    """The result of an attention, and what was asked beside it; None for what was not.

    `out [B, Hq, n_q, d_v]`; `lse` and `entropy` (nats) `[B, Hq, n_q]` and `column_mass [B, Hq, n_k]` in fp32;
    `weights [B, Hq, n_q, n_k]` in q's dtype.
    """

    out: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    column_mass: Tensor | None = None
    weights: Tensor | None = None


def attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    *,
    returns: Sequence[str] = (),
) -> Attention:
    """The attention that `spec` describes, by the best kernel that works here, and the side outputs asked for.

    They describe the normalised weights `p`, before `weight`, `gate` and dropout: entropy is `-sum p log p` over the
    keys and the sink, column mass the sum of p over queries. Only `weights` takes memory for every pair. All are
    differentiable; gradients of entropy, column mass and weights go through the reference.

    Args:
        spec: what to compute.
        q: `[B, Hq, n_q, d_qk]`; k: `[B, Hk, n_k, d_qk]`; v: `[B, Hv, n_k, d_v]`; of one floating dtype and device.
        captures: one tensor for each of the spec's captures, in order.
        scalars: one integer for each of the spec's scalars; with dropout one more, the seed of the mask.
        returns: of `lse`, `entropy`, `column_mass` and `weights`, beside those that the spec names.

    Raises:
        OptionError: for what is no spec, and for returns that are no names of side outputs.
        SpecError: for side outputs that such an attention does not have.
        ShapeError: for inputs that do not fit, or are no tensors.
    """
    if not isinstance(spec, AttentionSpec):
        raise OptionError(f"an AttentionSpec says what to compute; it is a {type(spec).__name__}.")
    asked = tuple(dict.fromkeys([*spec.returns, *_names(returns)]))
    _check_tensors({"q": q, "k": k, "v": v}, captures)
    replace(spec, returns=asked).verify()
    if spec.merge and set(asked):
        raise OptionError("an attention of several terms has no side outputs of its own: ask for those of its terms.")
    pairs, softmax = [name for name in PAIRS if name in asked], isinstance(spec.normalizer, Softmax)
    rows = dict.fromkeys([*(x for x in ROWS if x in asked), *(AGAIN if pairs and softmax else ())])
    plain = replace(spec, returns=())
    out, found = op.attention(replace(spec, returns=tuple(rows)), q, k, v, captures, scalars)
    by_name = named(tuple(rows), found)
    made = {name: by_name[name] for name in of_rows(asked) if name in Attention._fields}
    if pairs:
        known = _again(tuple(rows), found) if softmax else found.detach().new_empty(0)
        made |= {name: side(plain, name, q, k, known, captures, scalars) for name in pairs}
    return Attention(out, **made)


def _names(returns: Any) -> list[str]:
    """The names asked for. Raises `OptionError` for what are none, `SpecError` for others."""
    names = [returns] if isinstance(returns, str) else list(returns) if isinstance(returns, Iterable) else [returns]
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"returns are names of side outputs ({', '.join(_ASKED)}); they are {returns!r}.")
    unknown = [name for name in names if name not in _ASKED]
    if unknown:
        raise SpecError(f"unknown side outputs: {', '.join(map(repr, unknown))}; there are {', '.join(_ASKED)}.")
    return names


def _check_tensors(named: dict[str, Any], captures: Any) -> None:
    """Raise `ShapeError` for what is no tensor with strides."""
    if not isinstance(captures, (Sequence, Tensor)):
        raise ShapeError(f"captures are a sequence of tensors; they are a {type(captures).__name__}.")
    named = {**named, **{f"capture {place}": tensor for place, tensor in enumerate(captures)}}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} must be a tensor; it is a {type(tensor).__name__}.")
        if tensor.layout is not torch.strided:
            raise ShapeError(f"{name} must be a dense tensor; its layout is {tensor.layout}. Call to_dense() first.")


def _again(rows: Sequence[str], found: Tensor) -> Tensor:
    """The maximum and the sum of each row, contiguous `[B, Hq, n_q, 2]`, without a gradient."""
    first = rows.index(AGAIN[0])
    return found.detach()[..., first : first + len(AGAIN)].contiguous()
