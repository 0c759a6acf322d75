"""Masks by position, as data: each part says itself in words and evaluates itself on a grid. Free of torch.

In a part every expression stands for a number that the mask is about (an offset, a width, an end), never for the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.grid import Array, Grid
from attnopt.readable import show

_ZERO = sp.S.Zero


class Part:
    """A set of (b, h, q, k). `str` says it in words; `compound` tells whether the words need brackets."""

    compound = False

    def dense(self, grid: Grid) -> Array:
        """Booleans of the grid's shape, from the part's own numbers."""
        raise NotImplementedError(type(self).__name__)


def _between(value: Array, low: Array | None, high: Array | None, grid: Grid) -> Array:
    found = np.ones(grid.shape, bool)
    if low is not None:
        found = found & (value >= low)
    return found if high is None else found & (value <= high)


def _opt(grid: Grid, end: sp.Expr | None) -> Array | None:
    return None if end is None else grid.value(end)


def keys(count: sp.Expr) -> str:
    """A number of keys in words."""
    return f"{show(count)} key{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Band(Part):
    """Keys from `left` before to `right` after the query's own position `q + offset`; None is without end."""

    offset: sp.Expr = _ZERO
    left: sp.Expr | None = None
    right: sp.Expr | None = _ZERO

    @property
    def compound(self) -> bool:  # type: ignore[override]
        return self.right == 0 and self.left not in (None, 0)

    def dense(self, grid: Grid) -> Array:
        gap = grid.value(ex.k) - grid.value(ex.q) - grid.value(self.offset)
        return _between(gap, None if self.left is None else -grid.value(self.left), _opt(grid, self.right), grid)

    def _corner(self, sign: str) -> str:
        if self.offset in (0, ex.n_k - ex.n_q):
            return "top-left" if self.offset == 0 else "bottom-right"
        return f"k {sign} {show(ex.q + self.offset)}"

    def __str__(self) -> str:
        left, right = self.left, self.right
        if left == 0 and right == 0:
            return f"the query's own position only ({self._corner('==')})"
        if left is None and self.offset == -1 and right == 0:
            return "strictly causal (k < q)"
        if right == 0:
            window = "" if left is None else f", and within a window of {keys(left)} to the left"
            return f"causal ({self._corner('<=')}){window}"
        if right is None and left is not None:
            before = f"at most {keys(left)} to the left of the diagonal ({self._corner('==')})"
            return f"anti-causal ({self._corner('>=')})" if left == 0 else before
        if left is not None and right is not None and right.is_nonnegative and left.is_nonnegative is not False:
            return f"a window of {keys(left)} to the left and {show(right)} to the right ({self._corner('==')})"
        place = ex.q + self.offset
        low = "" if left is None else f"{show(place - left)} <= "
        return f"a diagonal band ({low}k{'' if right is None else f' <= {show(place + right)}'})"


@dataclass(frozen=True)
class Span(Part):
    """Keys `lo <= k < hi`, the same for all queries or, where the ends mention q, for each its own."""

    lo: sp.Expr | None = None
    hi: sp.Expr | None = None

    def dense(self, grid: Grid) -> Array:
        key, found = grid.value(ex.k), np.ones(grid.shape, bool)
        if self.lo is not None:
            found = found & (key >= grid.value(self.lo))
        return found if self.hi is None else found & (key < grid.value(self.hi))

    def __str__(self) -> str:
        ends = [e for e in (self.lo, self.hi) if e is not None]
        by_batch = all(e.has(ex.IntLoad) and not ex.depends(e, ex.h, ex.q) and ex.depends(e, ex.b) for e in ends)
        if self.lo is None and self.hi is not None and isinstance(self.hi - 1, ex.IntLoad) and self.hi.has(ex.q):
            return f"causal by position (k <= {show(self.hi - 1)})"
        if any(ex.depends(e, ex.q) for e in ends):
            low = "" if self.lo is None else f"{show(self.lo)} <= "
            high = "" if self.hi is None else f" <= {show(self.hi - 1)}"
            return f"a range of keys for each query ({low}k{high})"
        if self.lo is None and self.hi is not None:
            words = f"the first {keys(self.hi)}"
        elif self.hi is None and self.lo is not None:
            count = sp.expand(ex.n_k - self.lo)
            words = f"the keys from {show(self.lo)} on" if count.has(ex.n_k) else f"the last {keys(count)}"
        else:
            words = f"the keys from {show(self.lo)} to {show(self.hi - 1)}"  # type: ignore[operator]
        return f"not padding ({words})" if by_batch else words


@dataclass(frozen=True)
class Blocks(Part):
    """`-back <= (k + key_offset)//key_width - (q + offset)//width <= ahead`; None is without end."""

    width: sp.Expr
    key_width: sp.Expr
    offset: sp.Expr = _ZERO
    key_offset: sp.Expr = _ZERO
    back: sp.Expr | None = _ZERO
    ahead: sp.Expr | None = _ZERO

    def dense(self, grid: Grid) -> Array:
        key = (grid.value(ex.k) + grid.value(self.key_offset)) // grid.value(self.key_width)
        query = (grid.value(ex.q) + grid.value(self.offset)) // grid.value(self.width)
        return _between(
            key - query, None if self.back is None else -grid.value(self.back), _opt(grid, self.ahead), grid
        )

    def __str__(self) -> str:
        key = show(ex.FloorDiv(ex.k + self.key_offset, self.key_width))
        query = show(ex.FloorDiv(ex.q + self.offset, self.width))
        if self.back == 0 and self.ahead == 0:
            return f"the same block of {keys(self.key_width)} ({key} == {query})"
        if self.back is None and self.ahead == -1:
            return f"earlier blocks of {keys(self.key_width)} only ({key} < {query})"
        if self.back is None and self.ahead == 0:
            if self.key_width == 1:
                return f"causal by position ({key} <= {query})"
            return f"block-causal, no later block of {keys(self.key_width)} ({key} <= {query})"
        ends = [f"{show(n)} {word}" for n, word in ((self.back, "back"), (self.ahead, "ahead")) if n is not None]
        return f"blocks of {keys(self.key_width)} at most {' and '.join(ends)} ({key} against {query})"


@dataclass(frozen=True)
class Columns(Part):
    """`-left <= K - Q <= right` of one digit, `K = k // unit % width` and Q of q alike; None is without end."""

    width: sp.Expr
    unit: sp.Expr = sp.S.One
    left: sp.Expr | None = None
    right: sp.Expr | None = None

    def dense(self, grid: Grid) -> Array:
        unit, width = grid.value(self.unit), grid.value(self.width)
        gap = grid.value(ex.k) // unit % width - grid.value(ex.q) // unit % width
        return _between(gap, None if self.left is None else -grid.value(self.left), _opt(grid, self.right), grid)

    def __str__(self) -> str:
        ends = [f"{show(n)} {word}" for n, word in ((self.left, "left"), (self.right, "right")) if n is not None]
        digit = show(ex.Mod(ex.FloorDiv(ex.k, self.unit), self.width))
        return f"columns of a grid of width {show(self.width)} at most {' and '.join(ends)} ({digit})"


@dataclass(frozen=True)
class Neighbourhood(Part):
    """A box around the query on a grid: rows by `Blocks`, every other axis by `Columns`."""

    axes: tuple[Blocks | Columns, ...]

    def dense(self, grid: Grid) -> Array:
        found: Array = np.all([axis.dense(grid) for axis in self.axes], axis=0)
        return found

    def __str__(self) -> str:
        reach = []
        for axis in self.axes:
            left, right = (axis.back, axis.ahead) if isinstance(axis, Blocks) else (axis.left, axis.right)
            words = ["any" if e is None else show(e) for e in (left, right)]
            reach.append(words[0] if left == right else "/".join(words))
        sizes = " by ".join(show(a.width) for a in self.axes[1:])
        return f"a {len(self.axes)}-D neighbourhood of {' by '.join(reach)} on a grid of rows of {sizes}"


@dataclass(frozen=True)
class Phase(Part):
    """`(k + offset) % step < count`; with `relative`, `(k - q + offset) % step < count`."""

    step: sp.Expr
    offset: sp.Expr = _ZERO
    count: sp.Expr = sp.S.One
    relative: bool = False

    def dense(self, grid: Grid) -> Array:
        place = grid.value(ex.k) + grid.value(self.offset) - (grid.value(ex.q) if self.relative else 0)
        return np.broadcast_to(place % grid.value(self.step) < grid.value(self.count), grid.shape)

    def __str__(self) -> str:
        place = ex.k - ex.q + self.offset if self.relative else ex.k + self.offset
        formula = f"{show(ex.Mod(place, self.step))} {'== 0' if self.count == 1 else f'< {show(self.count)}'}"
        kind = "dilated" if self.relative else "strided"
        return f"{kind}, {show(self.count)} key{'' if self.count == 1 else 's'} in {show(self.step)} ({formula})"
