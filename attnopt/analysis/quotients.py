"""Quotients and remainders by numbers in lowest terms, so that spellings of one division meet. Free of torch."""

from __future__ import annotations

from functools import reduce

import sympy as sp

from attnopt import expr as ex


def tidy(e: sp.Expr) -> sp.Expr:
    """The expression with every quotient and remainder by a number in lowest terms."""
    if not e.args or not e.has(ex.FloorDiv, ex.Mod):
        return e
    args = [tidy(a) if isinstance(a, sp.Expr) else a for a in e.args]
    divides = isinstance(e, (ex.FloorDiv, ex.Mod)) and bool(args[1].is_Integer) and args[1] > 0
    if divides and args[0].is_integer:
        return (quotient if isinstance(e, ex.FloorDiv) else _remainder)(*args)
    return e.func(*args)


def quotient(x: sp.Expr, w: sp.Expr) -> sp.Expr:
    """`x // w` for an integer x and a positive number w: multiples of w leave it, common factors are divided out."""
    whole, rest = _split(sp.expand(x), w)
    if isinstance(rest, ex.FloorDiv) and rest.args[1].is_Integer:
        return whole + quotient(rest.args[0], w * rest.args[1])
    terms = [t for t in sp.Add.make_args(rest) if not t.is_number]
    common = reduce(sp.gcd, [t.as_coeff_Mul()[0] for t in terms], w)
    if terms and common > 1:
        constant = sp.floor((rest - sp.Add(*terms)) / common)
        rest, w = sum((t / common for t in terms), sp.S.Zero) + constant, w / common
    return whole + ex.FloorDiv(rest, w)


def _remainder(x: sp.Expr, w: sp.Expr) -> sp.Expr:
    rest = _split(sp.expand(x), w)[1]
    nested = [t for t in sp.Add.make_args(rest) if isinstance(t, ex.Mod) and (t.args[1] / w).is_Integer]
    if nested:
        return _remainder(rest + sum((t.args[0] - t for t in nested), sp.S.Zero), w)
    return ex.Mod(sp.Add(*[_reduced(t, w) for t in sp.Add.make_args(rest)]), w)


def _reduced(term: sp.Expr, w: sp.Expr) -> sp.Expr:
    """A term of a dividend with its coefficient at most half of w in size."""
    c, part = term.as_coeff_Mul()
    if term.is_number or not c.is_Integer or 2 * abs(c) <= w:
        return term
    return (c % w if 2 * (c % w) <= w else c % w - w) * part


def _split(x: sp.Expr, w: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """`x` as `w*whole + rest`, term by term."""
    whole: sp.Expr = sp.S.Zero
    rest: sp.Expr = sp.S.Zero
    for term in sp.Add.make_args(x):
        c, part = term.as_coeff_Mul()
        if c.is_Integer and (term.is_number or c % w == 0):
            whole, rest = whole + sp.floor(c / w) * part, rest + (c % w) * part
        else:
            rest += term
    return whole, rest


def digits(e: sp.Expr) -> sp.Expr:
    """`x - w*(x//w)` as `x % w`, and `x - x % w` as `w*(x//w)`, where that leaves fewer terms."""
    for term in sp.Add.make_args(e):
        c, part = term.as_coeff_Mul()
        if not isinstance(part, (ex.FloorDiv, ex.Mod)) or not (part.args[1].is_Integer and part.args[1] > 0):
            continue
        x, w = part.args
        if isinstance(part, ex.FloorDiv):
            whole, other = c / w * (x - ex.Mod(x, w)), c % w == 0
        else:
            whole, other = c * (x - w * ex.FloorDiv(x, w)), True
        moved = sp.expand(e - term + whole)
        if other and _linear_terms(moved) < _linear_terms(e):
            return digits(moved)
    return e


def _linear_terms(e: sp.Expr) -> int:
    return sum(t.as_coeff_Mul()[1] in (ex.k, ex.q) for t in sp.Add.make_args(e))
