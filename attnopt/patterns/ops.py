"""The operator table: one line an aten operator, to the expression of one element.

Keys are operator names, without overload unless overloads differ in meaning.
Values take lifted arguments (expressions or Python values) in
schema order. Booleans are sympy booleans, numbers are sympy numbers; `num` and `log` convert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy as sp
from sympy.logic.boolalg import BooleanFunction

from attnopt.expr import FloorDiv, Maximum, Minimum, Mod, Trunc, Where, is_boolean
from attnopt.expr import as_number as num
from attnopt.expr import number as ex_number
from attnopt.expr import truth as log


class Missing(BooleanFunction):
    """`Missing(x)`: whether x is NaN. No spec holds it: the reader of a mask or of weights takes it away."""


class Filled(sp.Function):
    """`Filled(x, y)`: y where x is NaN, the dtype's largest where it is infinite, else x. No spec holds it."""

    is_extended_real = True


def _missing(x: Any) -> Any:
    return sp.false if is_boolean(x) or x.is_integer else Missing(x)


def _nan_to_num(x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Any:
    if is_boolean(x) or x.is_integer:
        return x
    if posinf is not None or neginf is not None:
        raise NotImplementedError("infinities replaced by chosen numbers")
    return Filled(x, sp.S.Zero if nan is None else num(nan))


def _div(x: Any, y: Any, rounding_mode: str | None = None) -> sp.Expr:
    x, y = num(x), num(y)
    if rounding_mode == "floor" and x.is_integer and y.is_integer:
        return FloorDiv(x, y)
    if rounding_mode is not None:
        raise NotImplementedError(f"division rounded by {rounding_mode}")
    return x / y


def _remainder(x: Any, y: Any) -> sp.Expr:
    x, y = num(x), num(y)
    if not (x.is_integer and y.is_integer):
        raise NotImplementedError("the remainder of a float")
    return Mod(x, y)


def _exp(x: sp.Expr) -> sp.Expr:
    """The logarithm of what may be negative is NaN there, and so is its exponential: the two do not cancel."""
    if any(not log.args[0].is_extended_nonnegative for log in x.atoms(sp.log)):
        raise NotImplementedError("an exponential of a logarithm")
    return sp.exp(x)


def _log(x: sp.Expr) -> sp.Expr:
    """The logarithm of a mask is a mask: 0 where it holds, -inf where it does not."""
    if isinstance(x, Where) and x.args[1].is_nonnegative and x.args[2].is_nonnegative and x.args[1].is_number:
        return Where(x.args[0], *[sp.S.NegativeInfinity if a == 0 else sp.log(a) for a in x.args[1:]])
    return sp.log(x)


def _power(x: Any, y: Any) -> sp.Expr:
    if y.is_Integer and 0 <= y <= 4:
        if isinstance(num(x), sp.Pow) and num(x).exp.is_Rational and not num(x).exp.is_Integer:
            raise NotImplementedError("a power of a root, which is NaN for negative numbers")
        return num(x) ** y
    if y == sp.Rational(1, 2):
        return sp.sqrt(num(x))
    if not y.is_number and num(x).is_Rational and x > 0:  # a decay: 0.9**distance
        return sp.exp(num(y) * ex_number(math.log(x)))
    raise NotImplementedError("a power that is no small integer")


def _clamp(x: Any, low: Any = None, high: Any = None) -> sp.Expr:
    x = num(x)
    x = x if low is None else Maximum(x, num(low))
    return x if high is None else Minimum(x, num(high))


def _extreme(pick: Callable[..., Any]) -> Callable[..., Any]:
    """Two masks of the same two numbers make a third: the smaller one is kept where both keep, the larger where any."""

    def apply(x: Any, y: Any) -> Any:
        x, y = num(x), num(y)
        if not all(isinstance(m, Where) and m.args[1].is_number and m.args[2].is_number for m in (x, y)):
            return pick(x, y)
        if {*x.args[1:]} != {*y.args[1:]} or not all(m.is_extended_real for m in x.args[1:]):
            return pick(x, y)
        low, high = sorted(x.args[1:])
        lows = [m.args[0] if m.args[1] == low else sp.Not(m.args[0]) for m in (x, y)]
        return Where((sp.Or if pick is Minimum else sp.And)(*lows), low, high)

    return apply


def _compare(relation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: relation(num(x), num(y), evaluate=True)


def _equal(x: Any, y: Any) -> Any:
    """A float differs from itself where it is NaN, and only there."""
    same = num(x) == num(y) and not num(x).is_number
    return sp.Not(_missing(num(x))) if same else sp.Eq(num(x), num(y), evaluate=True)


def _bits(logic: Callable[..., Any], lowest: Callable[[sp.Expr], tuple[sp.Expr, sp.Expr]]) -> Callable[..., Any]:
    """Bitwise logic of booleans; of an integer and a boolean, which counts as its lowest bit.

    `lowest` gives what an integer becomes where the boolean holds, and where it does not.
    """

    def apply(x: Any, y: Any) -> Any:
        if all(map(_is_bit, (x, y))):
            found = logic(log(x), log(y))
            return found if is_boolean(x) and is_boolean(y) else num(found)
        if _is_bit(x) or _is_bit(y):
            bit, other = (x, y) if _is_bit(x) else (y, x)
            return Where(log(bit), *lowest(num(other)))
        raise NotImplementedError("bitwise arithmetic on integers")

    return apply


def _is_bit(x: Any) -> bool:
    """Whether a value is a boolean, or an integer made of one."""
    return is_boolean(x) or (isinstance(x, Where) and {*x.args[1:]} == {sp.S.Zero, sp.S.One})


def _xor(x: Any, y: Any) -> Any:
    return sp.Or(sp.And(x, sp.Not(y)), sp.And(sp.Not(x), y))


def _not(x: Any) -> Any:
    if is_boolean(x):
        return sp.Not(x)
    raise NotImplementedError("bitwise not on integers")


def _mul(x: Any, y: Any) -> Any:
    if is_boolean(x) and is_boolean(y):
        return sp.And(x, y)
    x, y = num(x), num(y)
    # A factor of a mask joins its branches: `1 - pad` times finfo.min is a mask of finfo.min.
    for a, c in ((x, y), (y, x)):
        if isinstance(a, Where) and a.args[1].is_number and a.args[2].is_number and c.is_number:
            return Where(a.args[0], a.args[1] * c, a.args[2] * c)
    return x * y


def _add(x: Any, y: Any, alpha: Any = sp.S.One) -> Any:
    if is_boolean(x) and is_boolean(y) and alpha == 1:
        return sp.Or(x, y)
    x, y = num(x), _mul(y, alpha) if alpha != 1 else num(y)
    for a, c in ((x, y), (y, x)):
        if isinstance(a, Where) and a.args[1].is_number and a.args[2].is_number and c.is_number:
            return Where(a.args[0], a.args[1] + c, a.args[2] + c)
    return x + y


_SLOPE = ex_number(0.01)


def _halves(x: Any, above: sp.Expr, below: sp.Expr) -> sp.Expr:
    """Another slope on each side of zero, without a comparison that rounding could decide."""
    return above * Maximum(num(x), sp.S.Zero) + below * Minimum(num(x), sp.S.Zero)


def _elu(x: Any, alpha: Any = sp.S.One, scale: Any = sp.S.One, input_scale: Any = sp.S.One) -> sp.Expr:
    below = sp.exp(Minimum(num(x), sp.S.Zero) * num(input_scale)) - 1
    return num(scale) * (Maximum(num(x), sp.S.Zero) + num(alpha) * below)


def _softplus(x: Any, beta: Any = sp.S.One, threshold: Any = 20) -> sp.Expr:
    """`log(1 + exp(x))`. Beyond the threshold the source returns x, which differs by less than a rounding."""
    if threshold < 20:
        raise NotImplementedError("a softplus that is cut off early")
    x = num(x) * num(beta)
    return (Maximum(x, sp.S.Zero) + sp.log(1 + sp.exp(-sp.Abs(x)))) / num(beta)


def _gelu(x: Any, approximate: str = "none") -> sp.Expr:
    x = num(x)
    if approximate == "none":
        return x * (1 + sp.erf(x * ex_number(0.5**0.5))) / 2
    inner = ex_number((2 / math.pi) ** 0.5) * (x + ex_number(0.044715) * x**3)
    return x * (1 + sp.tanh(inner)) / 2


POINTWISE: dict[str, Callable[..., Any]] = {
    "aten::add": _add,
    "aten::sub": lambda x, y, alpha=sp.S.One: _add(x, y, -num(alpha)),
    "aten::lerp": lambda x, y, weight: _add(num(x), _mul(num(weight), _add(num(y), num(x), sp.S.NegativeOne))),
    "aten::addcdiv": lambda x, y, z, value=sp.S.One: _add(x, _mul(_div(y, z), num(value))),
    "aten::addcmul": lambda x, y, z, value=sp.S.One: _add(x, _mul(y, z), value),
    "aten::rsub": lambda x, y, alpha=sp.S.One: _add(y, x, -num(alpha)),
    "aten::mul": _mul,
    "aten::div": _div,
    "aten::floor_divide": lambda x, y: _div(x, y, "floor"),
    "aten::remainder": _remainder,
    "aten::neg": lambda x: _mul(num(x), sp.S.NegativeOne),
    "aten::abs": lambda x: sp.Abs(num(x)),
    "aten::sign": lambda x: sp.sign(num(x)),
    "aten::exp": lambda x: _exp(num(x)),
    "aten::exp2": lambda x: sp.exp(num(x) * sp.Rational(math.log(2))),
    "aten::log": lambda x: _log(num(x)),
    "aten::logaddexp": lambda x, y: sp.log(sp.exp(num(x)) + sp.exp(num(y))),
    "aten::tanh": lambda x: sp.tanh(num(x)),
    "aten::sin": lambda x: sp.sin(num(x)),
    "aten::cos": lambda x: sp.cos(num(x)),
    "aten::erf": lambda x: sp.erf(num(x)),
    "aten::sigmoid": lambda x: 1 / (1 + sp.exp(-num(x))),
    "aten::relu": lambda x: Maximum(num(x), sp.S.Zero),
    "aten::relu6": lambda x: _clamp(x, sp.S.Zero, sp.Integer(6)),
    "aten::hardtanh": lambda x, low=sp.S.NegativeOne, high=sp.S.One: _clamp(x, low, high),
    "aten::leaky_relu": lambda x, slope=_SLOPE: _halves(x, sp.S.One, num(slope)),
    "aten::elu": _elu,
    "aten::softplus": _softplus,
    "aten::log_sigmoid": lambda x: -_softplus(-num(x)),
    "aten::silu": lambda x: num(x) / (1 + sp.exp(-num(x))),
    "aten::gelu": _gelu,
    "aten::mish": lambda x: num(x) * sp.tanh(_softplus(x)),
    "aten::hardsigmoid": lambda x: _clamp(num(x) + 3, sp.S.Zero, sp.Integer(6)) / 6,
    "aten::hardswish": lambda x: num(x) * _clamp(num(x) + 3, sp.S.Zero, sp.Integer(6)) / 6,
    "aten::log1p": lambda x: sp.log(1 + num(x)),
    "aten::expm1": lambda x: _exp(num(x)) - 1,
    "aten::sqrt": lambda x: sp.sqrt(num(x)),
    "aten::rsqrt": lambda x: 1 / sp.sqrt(num(x)),
    "aten::reciprocal": lambda x: 1 / num(x),
    "aten::pow": _power,
    "aten::square": lambda x: num(x) ** 2,
    "aten::clamp": _clamp,
    "aten::clamp_min": lambda x, low: _clamp(x, low),
    "aten::clamp_max": lambda x, high: _clamp(x, None, high),
    "aten::maximum": _extreme(Maximum),
    "aten::minimum": _extreme(Minimum),
    "aten::max.other": _extreme(Maximum),
    "aten::min.other": _extreme(Minimum),
    "aten::where": lambda c, x, y: Where(log(c), num(x), num(y)),
    "aten::masked_fill": lambda x, c, y: Where(log(c), num(y), num(x)),
    "aten::fill": lambda x, y: num(y),
    "aten::zero": lambda x: sp.S.Zero,
    "aten::eq": _equal,
    "aten::ne": lambda x, y: sp.Not(_equal(x, y)),
    "aten::isnan": _missing,
    "aten::nan_to_num": _nan_to_num,
    "aten::lt": _compare(sp.Lt),
    "aten::le": _compare(sp.Le),
    "aten::gt": _compare(sp.Gt),
    "aten::ge": _compare(sp.Ge),
    "aten::logical_and": lambda x, y: sp.And(log(x), log(y)),
    "aten::logical_or": lambda x, y: sp.Or(log(x), log(y)),
    "aten::logical_xor": lambda x, y: _xor(log(x), log(y)),
    "aten::logical_not": lambda x: sp.Not(log(x)),
    "aten::bitwise_and": _bits(sp.And, lambda x: (Mod(x, sp.Integer(2)), sp.S.Zero)),
    "aten::bitwise_or": _bits(sp.Or, lambda x: (x + 1 - Mod(x, sp.Integer(2)), x)),
    "aten::bitwise_xor": _bits(_xor, lambda x: (x + 1 - 2 * Mod(x, sp.Integer(2)), x)),
    "aten::bitwise_not": _not,
    "aten::__and__": _bits(sp.And, lambda x: (Mod(x, sp.Integer(2)), sp.S.Zero)),
    "aten::__or__": _bits(sp.Or, lambda x: (x + 1 - Mod(x, sp.Integer(2)), x)),
    "aten::trunc": lambda x: Trunc(num(x)),
}

# Operators that cost real work inside a score; a subexpression with one of them is loaded instead.
COSTLY = (sp.exp, sp.log, sp.sin, sp.cos, sp.erf, Trunc, Missing, Filled)
