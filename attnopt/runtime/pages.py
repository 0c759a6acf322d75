"""Keys and values in pages of a pool, a length for each entry of a batch: operands, and the definition in PyTorch.

Entry b of a batch is the attention that a spec describes over its own keys: `key_lengths[b]` of them, of which key i
stands at place `i % page` of page `page_table[b, i // page]`, and behind them those in tensors of new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.errors import ShapeError
from attnopt.runtime.op import attention
from attnopt.runtime.reference import Sample, reference
from attnopt.spec import AttentionSpec


@dataclass(frozen=True)
class Operands:
    """One call: `q [B, Hq, n_q, d_qk]`, pools `keys [pages, page, Hk, d_qk]` and `values [pages, page, Hv, d_v]`,
    `page_table [B, slots]` and `key_lengths [B]` in int32, the spec's captures and scalars. `new`: nothing, or keys
    `[B, n_new, Hk, d_qk]` and values `[B, n_new, Hv, d_v]` that follow those in pages.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    key_lengths: Tensor
    captures: tuple[Tensor, ...] = ()
    scalars: tuple[int, ...] = ()
    new: tuple[Tensor, ...] = ()

    @property
    def page(self) -> int:
        """Keys of a page."""
        return self.keys.shape[1]

    @property
    def n_new(self) -> int:
        """How many new keys every entry has."""
        return self.new[0].shape[1] if self.new else 0

    @property
    def room(self) -> int:
        """The most keys that an entry can have."""
        return self.page_table.shape[1] * self.page + self.n_new

    @property
    def lengths(self) -> list[int]:
        """How many keys each entry has, new ones among them. Read by the host."""
        return [n + self.n_new for n in self.key_lengths.tolist()]


def entry(given: Operands, b: int, length: int) -> tuple[Tensor, Tensor]:
    """The keys and values `[1, H, length, d]` of one entry, new ones among them.

    Raises `ShapeError` for what is out of range.
    """
    pages, most, length = given.keys.shape[0], given.room - given.n_new, length - given.n_new
    if not 0 <= length <= most:
        raise ShapeError(
            f"entry {b} has {length} keys; a page table of {given.page_table.shape[1]} pages of {given.page} has room "
            f"for 0 to {most}."
        )
    used = given.page_table[b, : -(-length // max(1, given.page))].long()
    if used.numel() and not (int(used.min()) >= 0 and int(used.max()) < pages):
        raise ShapeError(
            f"entry {b} names the pages {int(used.min())} to {int(used.max())}; "
            f"the pool has those from 0 to {pages - 1}."
        )
    keys, values = (t[used].flatten(0, 1)[:length] for t in (given.keys, given.values))
    if given.new:
        keys, values = (torch.cat([t, new[b]]) for t, new in zip((keys, values), given.new, strict=True))
    return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)


def entries(given: Operands) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each entry's number, keys and values. The host reads the lengths. Raises `ShapeError` as `entry` does."""
    for b, length in enumerate(given.lengths):
        yield (b, *entry(given, b, length))


def gathered(spec: AttentionSpec, given: Operands) -> tuple[Tensor, Tensor]:
    """`(out, lse)` entry by entry, its pages copied into one tensor: the definition, and what runs without a kernel."""
    whole, outs, sums = given.q.shape[0], [given.q.new_empty((0, spec.heads.q, given.q.shape[2], spec.heads.d_v))], []
    # Where nothing depends on which entry it is, each one is a call of the usual operator.
    alone = not any(ex.depends(e, ex.b, ex.n_b) for e in spec.expressions.values())
    for b, k, v in entries(given):
        q = given.q[b : b + 1]
        if alone:
            out, lse = attention(spec, q, k, v, given.captures, given.scalars)
        else:
            sample = Sample(batch=torch.tensor([b], device=q.device), whole_batch=whole)
            out, lse = reference(spec, q, k, v, given.captures, given.scalars, sample=sample)
        outs.append(out)
        sums.append(lse)
    if "lse" not in spec.returns or not sums:
        return torch.cat(outs), given.q.new_empty(0, dtype=torch.float32)
    return torch.cat(outs), torch.cat(sums)
