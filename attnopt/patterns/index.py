"""Index arithmetic: exact division and remainder of coordinates whose sizes are known, perhaps symbolically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy as sp

from attnopt.expr import FloorDiv, Mod


class Sizes:
    """The extent of every coordinate symbol: `0 <= symbol < size`. Sizes are numbers or symbolic sizes."""

    def __init__(self, sizes: Mapping[sp.Symbol, sp.Expr]) -> None:
        self.sizes = dict(sizes)

    def bounds(self, x: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
        """Inclusive lower and upper bound, or None when nothing is known."""
        if x.is_number:
            return x, x
        if isinstance(x, sp.Symbol):
            if x in self.sizes:
                return sp.S.Zero, self.sizes[x] - 1
            return (x, x) if x.is_positive or x.is_nonnegative else None
        if isinstance(x, sp.Add):
            parts = [self.bounds(t) for t in x.args]
            if any(p is None for p in parts):
                return None
            return sp.Add(*[p[0] for p in parts if p]), sp.Add(*[p[1] for p in parts if p])
        if isinstance(x, sp.Mul):
            return self._product(x)
        if isinstance(x, Mod) and nonnegative(x.args[1] - 1):
            return sp.S.Zero, x.args[1] - 1
        if isinstance(x, FloorDiv) and nonnegative(x.args[1] - 1):
            inner = self.bounds(x.args[0])
            return None if inner is None else (self.div(inner[0], x.args[1]), self.div(inner[1], x.args[1]))
        return None

    def _product(self, x: sp.Mul) -> tuple[sp.Expr, sp.Expr] | None:
        moving = [f for f in x.args if f.free_symbols & set(self.sizes)]
        if len(moving) != 1:
            return (x, x) if not moving and nonnegative(x) else None
        factor, inner = sp.Mul(*[f for f in x.args if f is not moving[0]]), self.bounds(moving[0])
        if inner is None:
            return None
        low, high = sp.expand(factor * inner[0]), sp.expand(factor * inner[1])
        return (low, high) if nonnegative(factor) else (high, low) if nonnegative(-factor) else None

    def split(self, x: sp.Expr, n: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
        """`(x // n, x % n)` where both are provably plain expressions, else None."""
        x = sp.expand(x)
        for near in (False, True):
            whole = sp.Add(*[q for q in (_quotient(term, n, near) for term in sp.Add.make_args(x)) if q is not None])
            remainder = sp.expand(x - n * whole)
            bounds = self.bounds(remainder)
            if bounds is not None and nonnegative(bounds[0]) and nonnegative(sp.expand(n - 1 - bounds[1])):
                return whole, remainder
        return None

    def div(self, x: sp.Expr, n: sp.Expr) -> sp.Expr:
        """`x // n`, simplified."""
        whole = _nested(x)
        if whole is not None:
            return self.div(whole[0], sp.expand(whole[1] * n))
        parts = self.split(x, n)
        if parts:
            return parts[0]
        coarse = self._coarse(x, n)
        return FloorDiv(coarse[0], n / coarse[2]) if coarse else FloorDiv(x, n)

    def mod(self, x: sp.Expr, n: sp.Expr) -> sp.Expr:
        """`x % n`, simplified."""
        if isinstance(x, Mod) and _divide(x.args[1], n) is not None:
            return self.mod(x.args[0], n)
        parts = self.split(x, n)
        if parts:
            return parts[1]
        coarse = self._coarse(x, n)
        return coarse[2] * Mod(coarse[0], n / coarse[2]) + coarse[1] if coarse else Mod(x, n)

    def _coarse(self, x: sp.Expr, n: sp.Expr) -> tuple[sp.Expr, sp.Expr, sp.Expr] | None:
        """`(y, r, g)` with `x = g*y + r`, `0 <= r < g` and g a divisor of n: only y matters to `x // n`."""
        if not n.is_Integer:
            return None
        for term in sp.Add.make_args(sp.expand(x)):
            step = term.as_coeff_Mul()[0]
            if step.is_Integer and 1 < step < n and n % step == 0:
                parts = self.split(x, step)
                if parts:
                    return parts[0], parts[1], step
        return None

    def reshape(self, index: Sequence[sp.Expr], old: Sequence[sp.Expr], new: Sequence[sp.Expr]) -> list[sp.Expr] | None:
        """The index into shape `new` of the element at `index` in shape `old`; None if sizes do not tell."""
        out: list[sp.Expr] = []
        i = j = 0
        while i < len(old) or j < len(new):
            left, right = [i], [j]
            a = old[i] if i < len(old) else sp.S.One
            b = new[j] if j < len(new) else sp.S.One
            i, j = min(i + 1, len(old)), min(j + 1, len(new))
            while not same(a, b):
                if _divide(b, a) is not None and i < len(old):
                    a, i = sp.expand(a * old[i]), i + 1
                elif j < len(new):
                    b, j = sp.expand(b * new[j]), j + 1
                elif i < len(old):
                    a, i = sp.expand(a * old[i]), i + 1
                else:
                    return None
            out += self._regroup(index[left[0] : i], old[left[0] : i], new[right[0] : j])
        return out

    def _regroup(self, index: Sequence[sp.Expr], old: Sequence[sp.Expr], new: Sequence[sp.Expr]) -> list[sp.Expr]:
        keep = [n for n in new if n != 1]
        if len(keep) == 1 and sum(o != 1 for o in old) == 1:
            moved = next(x for x, o in zip(index, old, strict=True) if o != 1)
            return [sp.S.Zero if n == 1 else moved for n in new]
        flat: sp.Expr = sp.S.Zero
        for x, size in zip(index, old, strict=True):
            flat = flat * size + x
        flat = _whole(flat)
        parts: list[sp.Expr] = []
        for place, size in reversed(list(enumerate(new))):
            first = all(n == 1 for n in new[:place])
            parts.append(sp.S.Zero if size == 1 else sp.expand(flat) if first else self.mod(flat, size))
            flat = flat if size == 1 else self.div(flat, size)
        return parts[::-1]


def _quotient(term: sp.Expr, n: sp.Expr, near: bool) -> sp.Expr | None:
    """`term / n`, exactly, or with `near` to the nearest integer coefficient: `31*q` is near `32*q`."""
    exact = _divide(term, n)
    if exact is not None or not near or not n.is_Integer or term.is_number:
        return exact
    coefficient, rest = term.as_coeff_Mul()
    nearest = sp.floor(coefficient / n + sp.Rational(1, 2)) if coefficient.is_Integer else sp.S.Zero
    return nearest * rest if nearest != 0 else None


def _nested(x: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
    """`(y, m)` with `x = y // m`: `z // m + c` is `(z + c*m) // m`."""
    floors = [t for t in sp.Add.make_args(x) if isinstance(t, FloorDiv)]
    if len(floors) != 1 or not floors[0].args[1].is_positive:
        return None
    inner, m = floors[0].args
    return sp.expand(inner + m * (x - floors[0])), m


def _whole(x: sp.Expr) -> sp.Expr:
    """`m*(z // m) + z % m` is `z`: digits that are put together again."""
    x = sp.expand(x)
    for low in x.atoms(Mod):
        z, m = low.args
        c = x.coeff(low)
        if c != 0 and sp.expand(x.coeff(FloorDiv(z, m)) - c * m) == 0:
            return _whole(x - c * low - c * m * FloorDiv(z, m) + c * z)
    return x


def same(a: sp.Expr, b: sp.Expr) -> bool:
    """Whether two sizes are equal for certain."""
    return a == b or sp.expand(a - b) == 0


def nonnegative(x: sp.Expr) -> bool:
    """Whether `x >= 0` for certain."""
    return x >= 0 if isinstance(x, int) else bool(x.is_nonnegative)


def _divide(term: sp.Expr, n: sp.Expr) -> sp.Expr | None:
    """`term / n` if that is a polynomial with integer coefficients."""
    if term == 0 or n == 0:
        return None
    if n.is_Integer:
        coefficient, rest = term.as_coeff_Mul()
        return coefficient / n * rest if coefficient.is_Integer and coefficient % n == 0 else None
    quotient = sp.cancel(term / n)
    return quotient if quotient.is_polynomial() and sp.denom(quotient) == 1 else None
