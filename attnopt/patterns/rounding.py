"""Where an expression in exact numbers would not say what the source's arithmetic, which rounds, computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy as sp
import torch
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex

# From here on a factor of a tensor may leave the range of its dtype: `(1 - m)*min` is finite where `min*m` is not.
_HUGE = sp.Integer(10) ** 29
# Fractions of integers that binary floating point numbers hold without rounding.
_FINE = 1024
_WIDE = (torch.float32, torch.float64)


def overflows(found: sp.Basic, dtype: torch.dtype) -> bool:
    """Whether a constant is beyond the dtype, where the source has an infinity: finfo(float32).min in bfloat16."""
    if not dtype.is_floating_point:
        return False
    limit = sp.Rational(torch.finfo(dtype).max)
    return any(abs(c) > limit for c in found.atoms(sp.Rational))


def undefined(found: sp.Basic) -> bool:
    """Whether infinities meet zeros or one another, which is NaN in the source: `0*inf`, `inf - inf`."""
    if found.has(sp.nan, sp.zoo):
        return True
    return found.has(sp.oo, ex.NEG_INF) and any(p.as_coeff_Mul()[0].is_infinite for p in found.atoms(sp.Mul))


def loads_floats(e: Any) -> bool:
    """Whether a value is made of elements of floating point tensors."""
    return isinstance(e, sp.Basic) and any(not isinstance(x, ex.IntLoad) for x in e.atoms(ex.Load))


def cancels(found: sp.Basic, given: Iterable[Any]) -> bool:
    """Whether a float of the operands is in the result no more."""
    before = {x for e in given if isinstance(e, sp.Basic) for x in e.atoms(ex.Load) if not isinstance(x, ex.IntLoad)}
    return bool(before) and not before <= found.atoms(ex.Load)


def out_of_range(found: sp.Basic) -> bool:
    """Whether a tensor's element is multiplied by a number so large that the order of a sum decides over infinity."""
    for product in found.atoms(sp.Mul):
        factor, rest = product.as_coeff_Mul()
        loads = any(f.has(ex.Load) and not isinstance(f, ex.Where) for f in sp.Mul.make_args(rest))
        if loads and factor.is_finite and abs(factor) >= _HUGE:
            return True
    return False


def rounds(found: sp.Basic, dtype: torch.dtype) -> bool:
    """Whether numbers that are computed in this dtype may be rounded, so that comparing exact ones is another test."""
    if not dtype.is_floating_point or not _computed(found):
        return False
    fine = sp.expand(found * _FINE) if isinstance(found, sp.Expr) else found
    return dtype not in _WIDE or not fine.is_integer


def _computed(found: sp.Basic) -> bool:
    """Whether this is more than a number, an element of a tensor, or a choice of such."""
    if isinstance(found, ex.Where):
        return any(_computed(x) for x in found.args[1:])
    return found.is_Symbol or not (found.is_number or isinstance(found, (ex.Load, Boolean)))
