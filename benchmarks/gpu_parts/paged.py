"""Kernels that read keys in pages, on the chip: every entry of a batch of ragged lengths against its own keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.aot.standard import layout_for
from attnopt.codegen.triton_plans import Chip
from attnopt.runtime.native import check_entries
from attnopt.runtime.pages import Operands, entry
from attnopt.runtime.triton_paged import Paged
from attnopt.spec import AttentionSpec

# Keys of a page: less than a tile, and several tiles. Who is checked, by what a mask can depend on.
PAGES = {"paged": 16, "paged prefill": 256}
# How many new keys follow those in pages.
NEW = {"paged": 0, "paged prefill": 57}
SPECS = ("causal_bottom_right", "window", "bias", "padding_causal", "sink", "softcap")


def in_pages(tensors: Sequence[Tensor], page: int, n_new: int = 0) -> Operands:
    """All of `k` and `v` but new ones in pages of a shuffled pool; the entries have all keys, none, a third there."""
    q, k, v, *captures = tensors
    new = tuple(t[:, :, t.shape[2] - n_new :].transpose(1, 2) for t in ((k, v) if n_new else ()))
    k, v = (t[:, :, : t.shape[2] - n_new] for t in (k, v))
    batch, _, n_k, _ = k.shape
    slots = -(-n_k // page)
    order = torch.randperm(batch * slots, device=k.device)

    def pool(t: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(t, (0, 0, 0, slots * page - n_k), value=torch.nan)
        return wide.transpose(1, 2).reshape(batch * slots, page, t.shape[1], t.shape[3]).index_select(0, order)

    lengths = torch.tensor([(n_k, 0, n_k // 3)[b % 3] for b in range(batch)], dtype=torch.int32, device=k.device)
    table = order.argsort().reshape(batch, slots).to(torch.int32)
    return Operands(q, pool(k), pool(v), table, lengths, tuple(captures), (), new)


def shapes(tensors: Sequence[Tensor], page: int) -> Operands:
    """Operands of the same sizes with nothing in them: fake tensors are not moved about."""
    q, k, v, *captures = tensors
    pools = (t.new_empty((1, page, t.shape[1], t.shape[3])) for t in (k, v))
    table, lengths = (q.new_empty(size, dtype=torch.int32) for size in ((len(q), -(-k.shape[2] // page)), (len(q),)))
    return Operands(q, *pools, table, lengths, tuple(captures))


def judged(
    spec: AttentionSpec, dtype: str, kind: str, tensors: Sequence[Tensor], chip: Chip, run: bool
) -> dict[str, Any]:
    """The verdict on the first entry that is wrong, else on the first."""
    made = Paged(spec.canonical(), replace(layout_for(spec, dtype), page=PAGES[kind], new=NEW[kind] > 0), chip)
    given = in_pages(tensors, PAGES[kind], NEW[kind]) if run else shapes(tensors, PAGES[kind])
    if made.problem or not run:
        plans = made.kernels[made.kind(given)] if not made.problem else ()
        return {"ok": not made.problem, "note": made.problem or f"dry: {made.kind(given)} {plans[0].plan}"}
    out, lse = made(given, False)
    verdicts = []
    for b, n in enumerate(given.lengths):
        own, place = (given.q[b : b + 1], *entry(given, b, n)), torch.tensor([b])
        verdicts.append(check_entries(spec, own, given.captures, (), (out, lse), place, len(given.q), given.q.shape[2]))
    wrong = [f"entry {b}: {verdict}" for b, verdict in enumerate(verdicts) if not verdict.ok]
    return {"ok": not wrong, "note": "; ".join(wrong) or str(verdicts[0])}
