"""Sizes of a graph as expressions: what torch makes of symbolic sizes, in the functions that specs know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import sympy as sp
import torch
from torch import fx
from torch.utils._sympy import functions as torch_functions

from attnopt.expr import FloorDiv, Maximum, Minimum, Mod
from attnopt.graph import value

_fixed: ContextVar[list[sp.Expr] | None] = ContextVar("attnopt_fixed_sizes", default=None)
_FUNCTIONS: dict[str, Callable[..., sp.Expr]] = {
    "FloorDiv": FloorDiv, "CleanDiv": FloorDiv, "Mod": Mod, "PythonMod": Mod, "Max": Maximum, "Min": Minimum,
    "IntTrueDiv": lambda x, y: x / y, "FloatTrueDiv": lambda x, y: x / y, "ToFloat": lambda x: x,
    "OpaqueUnaryFn_sqrt": sp.sqrt, "OpaqueUnaryFn_log": sp.log, "PowByNatural": lambda x, y: x**y,
    "FloatPow": lambda x, y: x**y,
}  # fmt: skip
_RULES = {getattr(torch_functions, name): rule for name, rule in _FUNCTIONS.items() if hasattr(torch_functions, name)}


def size(x: Any) -> sp.Expr:
    """A Python or symbolic number, or the node of one, as an expression."""
    if isinstance(x, fx.Node):
        x = value(x)
    if isinstance(x, (torch.SymInt, torch.SymFloat)):
        return known(x.node.expr)
    return sp.Integer(int(x))


@contextlib.contextmanager
def fixing() -> Iterator[list[sp.Expr]]:
    """Inside, sizes that have to be numbers are made numbers where whoever traced the graph can guard them.

    Gives the list of them: where it has any in the end, the graph is to be searched anew.
    """
    found: list[sp.Expr] = []
    token = _fixed.set(found)
    try:
        yield found
    finally:
        _fixed.reset(token)


def fix(node: fx.Node, wanted: sp.Expr) -> None:
    """Make a size of the node's tensor a number, under `fixing`."""
    found = _fixed.get()
    for x in value(node).shape if found is not None else ():
        if isinstance(x, torch.SymInt) and size(x) == wanted:
            int(x)
            found.append(wanted)  # type: ignore[union-attr]


def known(e: sp.Expr) -> sp.Expr:
    """The expression without torch's own functions, as far as they have a name here."""
    if not e.args or not e.atoms(*_RULES):
        return sp.Rational(str(e)) if e.is_Float else e
    args = [known(a) for a in e.args]
    rule = _RULES.get(e.func, e.func)
    # `Max` and `Min` take any number of arguments.
    while len(args) > 2 and e.func in (torch_functions.Max, torch_functions.Min):
        args[:2] = [rule(*args[:2])]
    return rule(*args)


def shape(node: Any) -> list[sp.Expr]:
    """The sizes of a node's tensor."""
    return [size(x) for x in value(node).shape]
