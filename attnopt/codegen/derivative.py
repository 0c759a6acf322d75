"""Derivatives of a spec's expressions: with respect to the product of query and key, or to a loaded element."""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.readable import show


def _compared(x: sp.Expr, y: sp.Expr, dx: sp.Expr, dy: sp.Expr) -> sp.Expr:
    """Of the larger of two numbers; of equal ones each has half, as in PyTorch."""
    return ex.Where(sp.Gt(x, y), dx, ex.Where(sp.Gt(y, x), dy, (dx + dy) / 2))


def _power(x: sp.Expr, n: sp.Expr, dx: sp.Expr, dn: sp.Expr) -> sp.Expr:
    """Of `1/(c + m e^a)`, a sigmoid, it is written so that an exponential which overflows yields zero, not inf/inf."""
    c, rest = x.as_coeff_Add()
    m, e = rest.as_coeff_Mul()
    if n == -1 and isinstance(e, sp.exp) and c.is_positive and m.is_positive:
        return -(dx / rest) / (c**2 / m * sp.exp(-e.args[0]) + 2 * c + rest)
    return n * x ** (n - 1) * dx


# By node: from the arguments and their derivatives to its own. One line a function.
_RULES: dict[type, Callable[..., sp.Expr]] = {
    sp.exp: lambda x, dx: sp.exp(x) * dx,
    sp.log: lambda x, dx: dx / x,
    sp.tanh: lambda x, dx: (1 - sp.tanh(x) ** 2) * dx,
    sp.sin: lambda x, dx: sp.cos(x) * dx,
    sp.cos: lambda x, dx: -sp.sin(x) * dx,
    sp.erf: lambda x, dx: 2 / sp.sqrt(sp.pi) * sp.exp(-(x**2)) * dx,
    sp.Abs: lambda x, dx: sp.sign(x) * dx,
    sp.Pow: _power,
    ex.Maximum: lambda x, y, dx, dy: _compared(x, y, dx, dy),
    ex.Minimum: lambda x, y, dx, dy: _compared(y, x, dx, dy),
    ex.Where: lambda c, x, y, dc, dx, dy: ex.Where(c, dx, dy),
}
# Steps, whose derivative is zero wherever it exists, and elements of tensors.
_FLAT = (sp.sign, sp.floor, ex.Trunc, ex.FloorDiv, sp.logic.boolalg.Boolean, ex.Load)


def derivative(expr: sp.Basic, symbol: sp.Basic) -> sp.Expr:
    """The derivative of `expr` by `symbol`, a symbol or a load. Raises `SpecError` where no rule gives one."""
    if expr == symbol:
        return sp.S.One
    if not expr.has(symbol) or isinstance(expr, _FLAT):
        return sp.S.Zero
    if isinstance(expr, sp.Add):
        return sp.Add(*[derivative(a, symbol) for a in expr.args])
    if isinstance(expr, sp.Mul):
        parts = [(i, derivative(a, symbol)) for i, a in enumerate(expr.args)]
        return sp.Add(*[sp.Mul(d, *(a for j, a in enumerate(expr.args) if j != i)) for i, d in parts if d != 0])
    rule = _RULES.get(sp.exp if isinstance(expr, sp.exp) else expr.func)
    if rule is None or (isinstance(expr, sp.Pow) and expr.args[1].has(symbol)):
        raise SpecError(f"no rule gives the derivative of {show(expr)}.")
    return rule(*expr.args, *(derivative(a, symbol) for a in expr.args))
