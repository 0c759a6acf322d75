"""The blocks of keys that a `Select` chooses: small tensors by torch's operators, on the device of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis import tables
from attnopt.analysis.blocks import EMPTY
from attnopt.runtime.lists import Lists, sizes_of
from attnopt.runtime.tables import values
from attnopt.select import Select
from attnopt.spec import AttentionSpec


@lru_cache(maxsize=256)
def _candidates(spec: AttentionSpec, block: tuple[int, int]) -> Lists:
    """The classes of tiles by blocks under the mask alone."""
    return Lists(replace(spec, select=None), block)


@torch.no_grad()
def chosen(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor] = (), scalars: Sequence[int] = ()
) -> Tensor:
    """What `spec.select` chooses, bool `[B, Hq, tiles, blocks]`; inputs as for the operator.

    Means and scores are taken in fp32 whatever the dtype, so that a check in fp64 sees the same choice. A NaN or
    infinite score is chosen first.
    """
    select, heads = spec.select, spec.heads
    assert select is not None
    shape = (q.shape[0], heads.q, -(-q.shape[2] // select.tile), -(-k.shape[2] // select.block))
    if 0 in (*shape, q.shape[3]):
        return torch.zeros(shape, dtype=torch.bool, device=q.device)
    sizes = sizes_of(spec, q, k, scalars)
    named = {c.name: t for c, t in zip(spec.captures, captures, strict=True)}
    kept = _kept(spec, sizes, named, q.device)
    means, count = _means(k, select.block, kept)
    queries, _ = _means(q, select.tile, None)
    classes = _candidates(spec, (select.tile, select.block)).classes(sizes, named, q.device)
    allowed = (classes != EMPTY) & (count > 0)
    forced = _forced(select, sizes, named, allowed)
    if select.shared:
        groups = [[h for h in range(heads.q) if heads.k_map[h] == one] or [0] for one in range(heads.k)]
        queries = torch.stack([queries[:, group].mean(1) for group in groups], 1)
        if allowed.shape[1] > 1:
            allowed, forced = (
                torch.stack([x[:, group].any(1) for group in groups], 1) for x in (allowed, forced.expand_as(allowed))
            )
    elif heads.k_map != tuple(range(heads.k)):
        means = means[:, list(heads.k_map)]
    scores = queries @ means.transpose(-1, -2) * float(select.scale)
    allowed, forced = allowed.expand_as(scores), forced.expand_as(scores)
    amount = [int(x) if select.rule == "topk" else float(x) for x in select.amount]
    share = torch.tensor(amount, device=q.device).reshape(-1, 1, 1).expand(scores.shape[1], 1, 1)
    picked = _RULES[select.rule](scores, allowed, forced, share, count)
    return picked[:, list(heads.k_map)] if select.shared else picked


def _kept(
    spec: AttentionSpec, sizes: dict[sp.Symbol, int], named: dict[str, Tensor], device: torch.device
) -> Tensor | None:
    """Which keys count in the means, `[B or 1, n_k]`: those of the clauses on keys alone; None for all."""
    clauses = [c for c in ex.conjuncts(tables.plan(spec.keep).rows) if not ex.depends(c, ex.h)]
    if sp.And(*clauses) == sp.true:
        return None
    return values(sp.And(*clauses), sizes, named, device)[:, 0, 0]


def _means(x: Tensor, block: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of every block `[B, H, blocks, D]`, and how many were taken, `[B or 1, 1, 1, blocks]`."""
    x, length = x.to(torch.float32), x.shape[2]
    blocks, whole = -(-length // block), length // block
    if kept is None:
        count = torch.full((blocks,), block, device=x.device)
        count[-1] = length - (blocks - 1) * block
        parts = [x[:, :, : whole * block].unflatten(2, (whole, block)).sum(3)] if whole else []
        if length % block:
            parts.append(x[:, :, whole * block :].sum(2, keepdim=True))
        return torch.cat(parts, 2) / count[:, None], count.reshape(1, 1, 1, -1)
    weight = torch.nn.functional.pad(kept.to(x.dtype), (0, blocks * block - length)).unflatten(1, (blocks, block))
    held = torch.nn.functional.pad(x, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block))
    count = weight.sum(-1)
    # A key that does not count may be anything, NaN included.
    total = held.masked_fill(weight[:, None, :, :, None] == 0, 0.0).sum(3)
    return total / count.clamp_min(1)[:, None, :, None], count[:, None, None]


def _forced(select: Select, sizes: dict[sp.Symbol, int], named: dict[str, Tensor], allowed: Tensor) -> Tensor:
    """Candidates that are kept in any case."""
    forced = torch.zeros_like(allowed)
    if select.first:
        forced |= allowed.cumsum(-1) <= select.first
    if select.own is not None:
        low, high = _own(select, select.own, sizes, named, allowed.device)
        places = torch.arange(allowed.shape[3], device=allowed.device)
        forced = forced | (places >= low[..., None]) & (places <= high[..., None])
    return forced & allowed


def _own(
    select: Select, place: sp.Expr, sizes: dict[sp.Symbol, int], named: dict[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first and the last block that holds a tile's own positions, `[B or 1, H or 1, tiles]` each."""
    own = values(place, sizes, named, device)[..., 0] // select.block
    tiles, rows = -(-sizes[ex.n_q] // select.tile), sizes[ex.n_q]
    own = own.expand(*own.shape[:2], rows)
    last = own[..., -1:].expand(*own.shape[:2], tiles * select.tile - rows)
    low, high = torch.cat([own, last], -1).unflatten(-1, (tiles, select.tile)).aminmax(dim=-1)
    return low, high


def _topk(scores: Tensor, allowed: Tensor, forced: Tensor, amount: Tensor, count: Tensor) -> Tensor:
    ranked = _ranked(scores, allowed, forced)
    most = min(int(amount.max()), scores.shape[-1])
    best = ranked.topk(most, -1).values
    last = (amount.clamp(max=most) - 1).expand(*scores.shape[:-1], 1)
    limit = best.gather(-1, last)
    above, equal = ranked > limit, ranked == limit
    room = amount - above.sum(-1, keepdim=True)
    return (above | equal & (equal.cumsum(-1) <= room)) & allowed | forced


def _mass(scores: Tensor, allowed: Tensor, forced: Tensor, amount: Tensor, count: Tensor) -> Tensor:
    logits = scores + count.log()
    shares = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    order = _ranked(logits, allowed, forced).argsort(dim=-1, descending=True, stable=True)
    sorted_shares = shares.gather(-1, order)
    reached = sorted_shares.cumsum(-1) - sorted_shares
    return torch.zeros_like(allowed).scatter(-1, order, reached < amount) & allowed | forced


def _ranked(scores: Tensor, allowed: Tensor, forced: Tensor) -> Tensor:
    known = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(scores.dtype).min)
    return known.masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)


_RULES = {"topk": _topk, "mass": _mass}
