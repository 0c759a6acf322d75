"""The run-time tables of a mask (`attnopt.analysis.tables`), in linear time on the captures' device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.intervals import Algebra, number
from attnopt.analysis.tables import LARGEST, Plan, Table
from attnopt.runtime.evaluate import Scope, evaluate


@dataclass(frozen=True)
class Filled:
    """The tables of one call.

    Attributes:
        ends: for each table its least and greatest values, `[B or 1, H or 1, blocks]` (one block where the table has no
            axis), float64. A NaN, or an integer beyond `LARGEST`, makes them infinite.
        first: first kept key, int64 `[B or 1, H or 1]`, `n_k` where none is; None without a condition on keys alone.
        last: last kept key, -1 where none is.
    """

    ends: Mapping[Table, tuple[Tensor, Tensor]]
    first: Tensor | None
    last: Tensor | None


def fill(
    plan: Plan,
    sizes: Mapping[sp.Symbol, int],
    captures: Mapping[str, Tensor],
    block: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Filled:
    """Every table of the plan.

    Args:
        plan: what to compute.
        sizes: `n_b, n_h, n_q, n_k`, none of them zero, and the scalars.
        captures: tensors by name.
        block: queries and keys of one block.
        device: where the coordinates are made; the captures must be there.
    """
    widths = {"q": block[0], "k": block[1], "": 1}
    ends = {t: _ends(values(t.load, sizes, captures, device), t.axis, widths[t.axis]) for t in plan.tables}
    if plan.rows == sp.true:
        return Filled(ends, None, None)
    kept = values(plan.rows, sizes, captures, device)[:, :, 0]
    some, last = kept.any(-1), sizes[ex.n_k] - 1
    first = kept.byte().argmax(-1).masked_fill(~some, last + 1)
    return Filled(ends, first, (last - kept.flip(-1).byte().argmax(-1)).masked_fill(~some, -1))


def values(
    expr: sp.Basic, sizes: Mapping[sp.Symbol, int], captures: Mapping[str, Tensor], device: torch.device | str,
    steps: tuple[int, int] = (1, 1),
) -> Tensor:  # fmt: skip
    """`[B or 1, H or 1, n_q or 1, n_k or 1]`: axes that the expression does not depend on have size 1.

    `steps`: every how many queries and keys there is a value.
    """
    extents = {
        symbol: (sizes[size] if ex.depends(expr, symbol) else 1, step)
        for symbol, size, step in zip(ex.COORDINATES, ex.SIZES, (1, 1, *steps), strict=True)
    }
    axes = {symbol: torch.arange(0, size, step, device=device) for symbol, (size, step) in extents.items()}
    # Where the axes go is known here; asked of their values, a device would be waited for.
    whole = {symbol: size for symbol, (size, step) in extents.items() if step == 1}
    scope = Scope(axes, sizes, captures, None, torch.float32, whole=whole)
    return evaluate(expr, scope).reshape([a.numel() for a in axes.values()])


def _ends(values: Tensor, axis: str, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of every block of the axis, `[B or 1, H or 1, blocks]`."""
    flat = values.flatten(2) if axis else values[:, :, 0]
    extra = -flat.shape[-1] % block
    if extra:  # repeat the last value: it changes no end of its block
        flat = torch.cat([flat, flat[..., -1:].expand(*flat.shape[:-1], extra)], -1)
    low, high = (x.to(torch.float64) for x in flat.unflatten(-1, (-1, block)).aminmax(dim=-1))
    # Ends that arithmetic cannot hold, and NaN, which says that some value of the block is none, are infinite.
    return (
        low.masked_fill(low.isnan() | (low < -LARGEST) & (not flat.is_floating_point()), -torch.inf),
        high.masked_fill(high.isnan() | (high > LARGEST) & (not flat.is_floating_point()), torch.inf),
    )


@functools.lru_cache(maxsize=64)
def algebra_on(device: torch.device) -> Algebra:
    """The arithmetic of ends for tensors of a device: nothing of it is read by the host, nothing comes from there."""

    def tensor(x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x
        dtype = torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else torch.float64
        return torch.full((), x, dtype=dtype, device=device)  # filled there, not copied

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: function(*map(tensor, args))

    floordiv = functools.partial(torch.div, rounding_mode="floor")
    return Algebra(
        number, of(floordiv), of(torch.remainder), of(torch.minimum), of(torch.maximum), of(torch.where), of(torch.eq),
        of(torch.logical_and), of(torch.logical_or), of(torch.logical_not),
        lambda size, step: torch.arange(0, size, step, device=device),
    )  # fmt: skip
