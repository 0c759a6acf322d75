"""Attention over a paged KV cache, for serving engines: any spec, one length for each entry of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError
from attnopt.runtime.paged import OPERATOR
from attnopt.runtime.pages import Operands
from attnopt.spec import AttentionSpec, Mixed

__all__ = ["attention"]


def attention(
    spec: AttentionSpec,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    key_lengths: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    *,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of the attention that `spec` describes, the keys of each batch entry in pages of a pool.

    Entry b attends to its own keys: key i of its first `key_lengths[b]` stands at place `i % page` of page
    `page_table[b, i // page]` (PagedAttention, Kwon et al., 2023), and new keys follow, where they are given. `n_k` in
    the spec is how many an entry has in all, so `k <= q + n_k - n_q` is causal attention of the last `n_q` tokens of
    each. An entry without keys yields zeros.

    Args:
        spec: what to compute; without dropout, merges and choices of blocks.
        q: `[B, Hq, n_q, d_qk]`, of float32, float16 or bfloat16.
        keys: `[pages, page, Hk, d_qk]`; values: `[pages, page, Hv, d_v]`; of q's dtype. Any page of at least one key.
        page_table: int32 `[B, slots]`. What stands beyond an entry's last key is not read.
        key_lengths: int32 `[B]`, each at most `slots * page`.
        captures: one tensor for each of the spec's captures, in order; those along keys reach the longest entry.
        scalars: one integer for each of the spec's scalars.
        new_keys: `[B, n_new, Hk, d_qk]`; new_values: `[B, n_new, Hv, d_v]`: of tokens that are not in the pool yet.

    Returns:
        `out [B, Hq, n_q, d_v]`, a transposed view of a contiguous `[B, n_q, Hq, d_v]`; `lse [B, Hq, n_q]` in fp32
        if the spec returns it, else an empty tensor.

    Raises:
        ShapeError: a shape, dtype, device, length or page that does not fit. Lengths and pages on a GPU are brought
            into range instead of being read by the host.
        OptionError: a spec that has no paged form, or inputs that want gradients.
    """
    _refuse(spec)
    if (new_keys is None) != (new_values is None):
        raise OptionError("new_keys and new_values come together; one of them was given.")
    new = () if new_keys is None or new_values is None else (new_keys, new_values)
    given = Operands(q, keys, values, page_table, key_lengths, tuple(captures), tuple(scalars), new)
    _check(spec, given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, keys, values, *captures, *new)):
        raise OptionError("paged attention has no gradients; call it under torch.no_grad(), or detach its inputs.")
    tables = page_table, key_lengths
    out, lse = OPERATOR(q, keys, values, *tables, list(new), list(captures), list(scalars), spec.text)
    return out, lse


def _refuse(spec: AttentionSpec) -> None:
    """Raise `OptionError` for what is no spec, and for a spec that has no paged form."""
    if not isinstance(spec, AttentionSpec):
        raise OptionError(f"an AttentionSpec says what to compute; it is a {type(spec).__name__}.")
    reason = "it has dropout" if spec.dropout else ""
    if spec.select is not None or spec.merge or isinstance(spec.normalizer, Mixed):
        reason = "it is more than one softmax or sum over the keys that `keep` allows"
    if set(spec.returns) - {"lse"}:
        reason = "of its side outputs only lse has a paged form"
    if reason:
        raise OptionError(f"paged attention was asked for {spec}, but {reason}.")


def _check(spec: AttentionSpec, given: Operands) -> None:
    """Raise `ShapeError` with what was asked, what was seen and what to do."""
    heads, batch = spec.heads, given.q.shape[0]
    pages, page = given.keys.shape[:2] if given.keys.dim() == 4 else (None, None)
    wanted: tuple[tuple[str, Tensor, tuple[int | None, ...]], ...] = (
        ("q", given.q, (None, heads.q, None, heads.d_qk)),
        ("keys", given.keys, (None, None, heads.k, heads.d_qk)),
        ("values", given.values, (pages, page, heads.v, heads.d_v)),
        ("page_table", given.page_table, (batch, None)),
        ("key_lengths", given.key_lengths, (batch,)),
    )
    if given.new:
        wanted += (
            ("new_keys", given.new[0], (batch, None, heads.k, heads.d_qk)),
            ("new_values", given.new[1], (batch, given.n_new, heads.v, heads.d_v)),
        )
    for name, tensor, shape in wanted:
        if tensor.dim() != len(shape) or any(w not in (None, n) for w, n in zip(shape, tensor.shape, strict=False)):
            asked = ", ".join("any" if w is None else str(w) for w in shape)
            raise ShapeError(f"{name} must have the shape [{asked}]; it is {list(tensor.shape)}.")
    if page == 0:
        raise ShapeError("a page must hold at least one key; keys is [pages, page, heads, width] with a page of 0.")
    dtypes = [t.dtype for t in (given.q, given.keys, given.values, *given.new)]
    if len(set(dtypes)) > 1 or not given.q.is_floating_point():
        raise ShapeError(f"q, keys and values must have one floating dtype; they are {_names(dtypes)}. Cast them.")
    dtypes = [t.dtype for t in (given.page_table, given.key_lengths)]
    if dtypes != [torch.int32, torch.int32]:
        raise ShapeError(f"page_table and key_lengths must be int32; they are {_names(dtypes)}. Cast them once.")
    every = (given.q, given.keys, given.values, given.page_table, given.key_lengths, *given.captures, *given.new)
    if len({t.device for t in every}) > 1:
        places = ", ".join(sorted({str(t.device) for t in every}))
        raise ShapeError(f"all tensors of an attention must be on one device; they are on {places}.")
    if len(given.captures) != len(spec.captures) or len(given.scalars) != len(spec.scalars):
        raise ShapeError(
            f"the spec takes the captures {[c.name for c in spec.captures]} and the scalars {list(spec.scalars)}; "
            f"{len(given.captures)} and {len(given.scalars)} were given."
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
