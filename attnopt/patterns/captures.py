"""What a spec's expressions load: every tensor that they read gets one name and one order of dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline
from attnopt.graph import value
from attnopt.patterns.lift import PRODUCT, Lifter
from attnopt.region import Line, Operand
from attnopt.spec import Capture

_ORDER = {"b": 0, "h": 1, "q": 2, "k": 3}


def loaded(exprs: dict[str, Any], lifter: Lifter) -> tuple[Any, dict[str, Any]]:
    """Give every loaded node one capture with fixed dimensions dropped, the rest ordered, under a stable name."""
    found = ex.loads(*exprs.values())
    indices: dict[str, list[tuple[sp.Expr, ...]]] = {}
    for load in found:
        indices.setdefault(load.args[0].name, []).append(load.args[1:])
    layouts = {name: _layout(uses) for name, uses in indices.items()}
    ranked = sorted(
        indices, key=lambda n: (_fingerprint(lifter.nodes[n], indices[n], layouts[n]), _own(lifter.nodes[n]))
    )
    operands: dict[str, Operand] = {}
    renamed: dict[sp.Basic, sp.Basic] = {}
    counts: dict[str, int] = {}
    fresh: dict[str, str] = {}
    for name in ranked:
        node = lifter.nodes[name]
        if name.endswith(PRODUCT):
            return Decline("a second product of queries is added to the scores", node), exprs
        if not isinstance(value(node), torch.Tensor):
            return Decline("a number that the model computes enters the scores", node), exprs
        fixed, order = layouts[name]
        new = fresh[name] = _name(node, indices[name], counts)
        operands[new] = Operand(
            node, tuple(fixed[i] if i in fixed else f"x{order.index(i)}" for i in range(value(node).dim()))
        )
    # A table may be read at a loaded place: what is inside is renamed before what is around it.
    for load in sorted(found, key=lambda x: (len(x.atoms(ex.Load)), str(x))):
        name = load.args[0].name
        moved = [load.args[1 + i].xreplace(renamed) for i in layouts[name][1]]
        renamed[load] = ex.load(fresh[name], *moved, integer=isinstance(load, ex.IntLoad))
    return operands, {part: _replace(e, renamed) for part, e in exprs.items()}


def _replace(expr: sp.Basic, renamed: Mapping[sp.Basic, sp.Basic]) -> sp.Basic:
    return ex.canon(expr.xreplace(dict(renamed)))


def _layout(uses: list[tuple[sp.Expr, ...]]) -> tuple[dict[int, int], list[int]]:
    """Dimensions that every use fixes to one number, and the others in the order batch, head, query, key."""
    rank = len(uses[0])
    fixed = {i: int(uses[0][i]) for i in range(rank) if all(u[i] == uses[0][i] for u in uses) and uses[0][i].is_Integer}

    def place(i: int) -> int:
        names = {x.name for x in uses[0][i].free_symbols}
        return max((_ORDER.get(n[0] if n not in _ORDER else n, 0) for n in names), default=0)

    return fixed, sorted((i for i in range(rank) if i not in fixed), key=place)


def _fingerprint(node: fx.Node, uses: Any, layout: Any) -> str:
    text = sorted(str([u[i] for i in layout[1]]) for u in uses)
    return f"{value(node).dtype if isinstance(value(node), torch.Tensor) else ''}{text}"


def _own(node: Any) -> fx.Node:
    """The node of the graph behind a leaf. Nodes compare by their place in the graph."""
    return node.table if isinstance(node, Line) else node


def _name(node: fx.Node, uses: list[Any], counts: dict[str, int]) -> str:
    dtype = value(node).dtype
    base = "bias" if dtype.is_floating_point else "mask" if len(uses) == 1 else "ids"
    counts[base] = counts.get(base, 0) + 1
    return base if counts[base] == 1 else f"{base}{counts[base]}"


def capture(name: str, operand: Operand) -> Capture:
    """The capture of this name, with the sizes that are known."""
    seen = value(operand.node)
    kind = "float" if seen.dtype.is_floating_point else "bool" if seen.dtype == torch.bool else "int"
    moving = sorted((str(d), i) for i, d in enumerate(operand.dims) if isinstance(d, str))
    sizes = [seen.shape[i] for _, i in sorted(moving, key=lambda m: int(m[0][1:]))]
    if isinstance(operand.node, Line) and operand.node.meta["symbolic"]:
        sizes[-1] = None
    return Capture(name, kind, tuple(n if isinstance(n, int) else None for n in sizes))
