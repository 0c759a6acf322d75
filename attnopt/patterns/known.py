"""Tensors whose values are known when the graph is captured: constants, buffers, and what is made of them alone.

A table of two values that follows the diagonal, as a causal buffer does, is read as an expression of its indices.
That is proven by looking at every element. A buffer may be changed later, so whoever relies on one marks it by
`KNOWN` in its node's meta, and the compiled model looks at its version before every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.graph import value

KNOWN = "attnopt_known"
# Elements that are read around an anchor, and around a node that is only tried.
BUDGET, TRIAL = 2000, 120
_MOST_ELEMENTS = 1 << 24
_MOST_STEPS = 200
# Above this a number may be a mask's fill.
_LARGE = 1e29
_DRAWN = torch.Tag.nondeterministic_seeded


class Known(Mapping[str, torch.Tensor]):
    """Scalars that the trace made, by placeholder name, and (for `tensor`) larger constants and buffers."""

    def __init__(self, scalars: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.scalars, self.tensors = dict(scalars), {**dict(tensors or {}), **dict(scalars)}
        # How many elements a lifter may read before it gives up.
        self.budget = BUDGET
        self._values: dict[fx.Node, Any] = {}
        self._numbers: dict[fx.Node, sp.Expr | None] = {}
        self._forms: dict[tuple[fx.Node, tuple[int | None, ...]], Any] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.scalars[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scalars)

    def __len__(self) -> int:
        return len(self.scalars)

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The value of the node if no input of the model reaches it."""
        found = self._value(node, [_MOST_STEPS])
        self._values.setdefault(node, found)  # also where the search gave up
        return found if isinstance(found, torch.Tensor) else None

    def _value(self, node: Any, steps: list[int]) -> Any:
        if isinstance(node, (list, tuple)):
            parts = [self._value(x, steps) for x in node]
            return None if any(p is None and x is not None for p, x in zip(parts, node, strict=True)) else parts
        if not isinstance(node, fx.Node):
            return node
        if node not in self._values:
            found = self._compute(node, steps)
            if found is None and steps[0] < 0:  # not looked at: a search that starts here may know it
                return None
            self._values[node] = found
        return self._values[node]

    def _compute(self, node: fx.Node, steps: list[int]) -> Any:
        if node.op == "placeholder":
            held = self.tensors.get(str(node.target))
            # An inference tensor counts no changes, so nobody could tell that it has one.
            return None if held is None or (held.is_inference() and held.dim()) else held
        steps[0] -= 1
        if node.op != "call_function" or steps[0] < 0 or not _repeatable(node):
            return None
        args = [self._value(a, steps) for a in node.args]
        kwargs = {k: self._value(a, steps) for k, a in node.kwargs.items()}
        given = [*zip(args, node.args, strict=True), *((kwargs[k], a) for k, a in node.kwargs.items())]
        if any(v is None and a is not None for v, a in given):
            return None
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _number(self, node: fx.Node) -> sp.Expr | None:
        """A scalar's value, if it is made of scalars that nobody can change."""
        if node not in self._numbers:
            narrow = Known(self.scalars)
            table = narrow.tensor(node)
            plain = table is not None and not table.dim() and not table.is_complex() and table.dtype != torch.bool
            self._numbers[node] = ex.number(table.item()) if plain and table is not None else None
        if self._numbers[node] is not None:
            _rely(node)
        return self._numbers[node]

    def finite(self, node: fx.Node) -> bool:
        """Whether the node is known, and all of its values are finite and far from a mask's fill."""
        table = self.tensor(node)
        if table is None or not table.is_floating_point():
            return False
        _rely(node)
        return bool((table.abs() < _LARGE).all())

    def closed(self, node: fx.Node, index: Sequence[sp.Expr]) -> sp.Basic | None:
        """The element at `index` as an expression of two of the indices; None if the values are not so regular."""
        if not index:
            return self._number(node)
        moving = [i for i, x in enumerate(index) if not x.is_Integer]
        seen = value(node)
        if len(moving) != 2 or not isinstance(seen, torch.Tensor):
            return None
        if not all(isinstance(seen.shape[i], int) and seen.shape[i] > 1 for i in moving):
            return None
        fixed = tuple(None if i in moving else int(x) for i, x in enumerate(index))
        if (node, fixed) not in self._forms:
            table = self.tensor(node)
            picked = None if table is None else table[tuple(slice(None) if x is None else x for x in fixed)]
            self._forms[node, fixed] = None if picked is None else two_valued(picked)
        found = self._forms[node, fixed]
        if found is None:
            return None
        _rely(node)
        return found.xreplace({_I: index[moving[0]], _J: index[moving[1]]})


_I, _J = sp.symbols("_i _j", integer=True, nonnegative=True)


def two_valued(table: torch.Tensor) -> sp.Basic | None:
    """A matrix of two values as `Where(condition on row and column, x, y)`; of booleans, as the condition itself."""
    if table.is_sparse or table.is_complex() or table.is_quantized or not 0 < table.numel() <= _MOST_ELEMENTS:
        return None
    first = table[0, 0]
    inside = table == first
    if bool(inside.all()) or bool(first.isnan()):
        return None
    other = table[~inside][0]
    if not bool((inside | (table == other)).all()):
        return None
    for kept, x, y in ((inside, first, other), (~inside, other, first)):
        condition = _band(kept)
        condition = _blocks(kept) if condition is None else condition
        if condition is not None:
            if table.dtype == torch.bool:
                return condition if bool(x) else sp.Not(condition)
            return ex.Where(condition, ex.number(x.item()), ex.number(y.item()))
    return None


def _band(kept: torch.Tensor) -> sp.Basic | None:
    """`low <= column - row <= high` if exactly these are kept."""
    rows, columns = (torch.arange(n, device=kept.device) for n in kept.shape)
    gap = columns - rows[:, None]
    low, high = int(gap[kept].min()), int(gap[kept].max())
    if not torch.equal(kept, (gap >= low) & (gap <= high)):
        return None
    tests = []
    if low > 1 - kept.shape[0]:
        tests.append(sp.Ge(_J - _I, low))
    if high < kept.shape[1] - 1:
        tests.append(sp.Le(_J - _I, high))
    return sp.And(*tests)


def _blocks(kept: torch.Tensor) -> sp.Basic | None:
    """`row // w == column // w` if exactly these are kept."""
    w = int(kept[0].long().cumprod(0).sum())
    if not w:
        return None
    rows, columns = (torch.arange(n, device=kept.device) // w for n in kept.shape)
    return sp.Eq(ex.FloorDiv(_I, w), ex.FloorDiv(_J, w)) if torch.equal(kept, rows[:, None] == columns) else None


def _repeatable(node: fx.Node) -> bool:
    """Whether the node computes the same at every call and changes nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    seen = node.meta.get("val")
    sizes = seen.shape if isinstance(seen, torch.Tensor) else ()
    if not all(isinstance(n, int) for n in sizes) or math.prod(sizes) > _MOST_ELEMENTS:
        return False
    if "empty" in target._schema.name or target._schema.is_mutable or _DRAWN in target.tags:
        return False
    return target.namespace == "aten"


def _rely(node: fx.Node) -> None:
    """Mark every constant and buffer that the node is made of."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            current.meta[KNOWN] = True
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
