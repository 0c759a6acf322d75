"""The symbols and functions that a spec's expressions are made of, and numbers and truth values as expressions."""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt.errors import SpecError

# q·k before any scale, and the coordinates: batch, query head, query position, key position, feature.
s = sp.Symbol("s", real=True)
b, h, q, k, d = sp.symbols("b h q k d", integer=True, nonnegative=True)
# Sizes that are known only at run time: batch, heads, queries, keys.
n_b, n_h, n_q, n_k = sp.symbols("n_b n_h n_q n_k", integer=True, positive=True)
COORDINATES = (b, h, q, k)
# Sums over a row's keys, of the weights and of their absolute values: what a pointwise normaliser divides by.
t, a = sp.symbols("t a", real=True)
SIZES = (n_b, n_h, n_q, n_k)
NEG_INF = sp.S.NegativeInfinity


class Load(sp.Function):
    """`Load(name, i, j, ...)`: a floating-point element of a captured tensor."""

    is_extended_real = True

    @classmethod
    def eval(cls, *args: sp.Basic) -> None:
        return None

    def _eval_derivative(self, symbol: sp.Symbol) -> sp.Expr:
        return sp.S.Zero


class IntLoad(Load):
    """An element of a captured integer or boolean tensor (True is 1)."""

    is_integer = True
    is_finite = True


class FloorDiv(sp.Function):
    """Integer division that rounds down."""

    is_integer = True

    @classmethod
    def eval(cls, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        if y == 1:
            return x
        if x.is_Integer and y.is_Integer and y != 0:
            return sp.Integer(int(x) // int(y))
        return None


class Mod(sp.Function):
    """Remainder with the sign of the divisor."""

    is_integer = True

    @classmethod
    def eval(cls, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        if y == 1:
            return sp.S.Zero
        if x.is_Integer and y.is_Integer and y != 0:
            return sp.Integer(int(x) % int(y))
        return None


class Maximum(sp.Function):
    """The larger of two numbers."""

    is_extended_real = True

    @classmethod
    def eval(cls, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        if x == y or (x.is_Rational and y.is_Rational):
            return max(x, y)
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if all(a.is_integer for a in self.args) else None


class Minimum(sp.Function):
    """The smaller of two numbers."""

    is_extended_real = True

    @classmethod
    def eval(cls, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        if x == y or (x.is_Rational and y.is_Rational):
            return min(x, y)
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if all(a.is_integer for a in self.args) else None


class Trunc(sp.Function):
    """A float rounded toward zero to an integer, as a cast does."""

    is_integer = True

    @classmethod
    def eval(cls, x: sp.Expr) -> sp.Expr | None:
        return x if x.is_integer else None


class Snap(sp.Function):
    """`Snap(x, unit)`: the multiple of a power of two that is nearest to x, as adding a large number leaves it.

    Its gradient is that of x, as autograd has it for the addition.
    """

    is_extended_real = True

    @classmethod
    def eval(cls, x: sp.Expr, unit: sp.Expr) -> sp.Expr | None:
        return unit * round(x / unit) if x.is_Rational and unit.is_Rational else None

    def _eval_derivative(self, symbol: sp.Symbol) -> sp.Expr:
        return sp.diff(self.args[0], symbol)


class Where(sp.Function):
    """`Where(condition, x, y)`: x where the condition holds, else y."""

    is_extended_real = True

    @classmethod
    def eval(cls, c: Boolean, x: sp.Expr, y: sp.Expr) -> sp.Expr | None:
        if c == sp.true or x == y:
            return x
        return y if c == sp.false else None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None

    def _eval_derivative(self, symbol: sp.Symbol) -> sp.Expr:
        c, x, y = self.args
        return Where(c, sp.diff(x, symbol), sp.diff(y, symbol))


def load(name: str, *indices: sp.Expr, integer: bool = False) -> Load:
    """The element of the captured tensor `name` at `indices`."""
    if not name.isidentifier():
        raise SpecError(f"a capture's name must be an identifier: {name!r}.")
    return (IntLoad if integer else Load)(sp.Symbol(name), *indices)


def is_boolean(value: object) -> bool:
    """Whether an expression is a condition. A sympy symbol counts as both; ours are always numbers."""
    return isinstance(value, Boolean) and not isinstance(value, sp.Symbol)


def number(value: float | int | bool) -> sp.Expr:
    """A Python number as an exact rational (or an infinity)."""
    if value != value:
        return sp.nan
    if value in (float("inf"), float("-inf")):
        return sp.oo if value > 0 else NEG_INF
    return sp.Integer(value) if isinstance(value, int) else sp.Rational(value)


def truth(value: sp.Basic) -> Boolean:
    """A number as a boolean: non-zero is True. Sees through `Where(c, 1, 0)`."""
    if is_boolean(value):
        return value  # type: ignore[return-value]
    if value.is_number:
        return sp.true if value != 0 else sp.false
    if isinstance(value, Where) and value.args[1].is_number and value.args[2].is_number:
        yes, no = value.args[1] != 0, value.args[2] != 0
        return sp.true if yes and no else value.args[0] if yes else sp.Not(value.args[0]) if no else sp.false
    if isinstance(value, Where) and 0 in value.args[1:]:
        c, x, y = value.args
        return sp.And(c, truth(x)) if y == 0 else sp.And(sp.Not(c), truth(y))
    return sp.Ne(value, 0)


def as_number(value: sp.Basic) -> sp.Expr:
    """A boolean as 0 or 1; numbers pass through."""
    if is_boolean(value):
        return Where(value, sp.S.One, sp.S.Zero)
    return value  # type: ignore[return-value]


def depends(expr: sp.Basic, *symbols: sp.Symbol) -> bool:
    """Whether the expression mentions one of the symbols (capture names do not count)."""
    return bool(expr.free_symbols & set(symbols))


def sides(expr: sp.Basic) -> tuple[sp.Basic, ...]:
    """The arguments to evaluate. A comparison with zero is evaluated as a comparison of its two sides: no difference
    of large integers can overflow, and infinities compare with one another. Terms are added as `magnitude` orders them.
    """
    if isinstance(expr, sp.Add):
        return tuple(sorted(expr.args, key=magnitude))
    if isinstance(expr, sp.core.relational.Relational) and expr.args[1] == 0 and isinstance(expr.args[0], sp.Add):
        left = [t for t in expr.args[0].args if not t.could_extract_minus_sign()]
        right = [-t for t in expr.args[0].args if t.could_extract_minus_sign()]
        return sp.Add(*left), sp.Add(*right)
    return tuple(expr.args)


def magnitude(term: sp.Basic) -> tuple[bool, bool]:
    """Order of addition: what balances exactly (`-1e4 + 1e4*mask`), then floats, then scores, which it may absorb."""
    return term.has(s), any(not isinstance(load, IntLoad) for load in term.atoms(Load))


def conjuncts(keep: Boolean) -> Iterable[Boolean]:
    """The clauses of a conjunction; a single clause for anything else."""
    return keep.args if isinstance(keep, sp.And) else () if keep == sp.true else (keep,)
