"""Masks read out of scores: which keys are kept, and what a row without any kept key yields.

A constant joins `keep` only where that changes nothing: minus infinity always does; a huge negative number
(such as finfo.min) does when it stands alone, since then a fully masked row is uniform. Everything else,
-1e4 for one, stays in the score. A uniform row does not depend on the scores that the fill absorbed, so no
gradient reaches them; autograd of the source's addition would pass one through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.spec import EmptyRow

# Below this a float32 or bfloat16 score is absorbed: adding any score of a magnitude under 1e29 returns the fill.
HUGE = -(sp.Integer(10) ** 37)
# From here on a number is no score, and a number above this share of a fill takes the whole weight beside it.
_LARGE, _CLEAR = sp.Integer(10) ** 29, sp.Rational(9, 10)
# From here on adding a number to a score of sixteen bits rounds the score to multiples of a unit that matters.
_COARSE = -256


@dataclass(frozen=True)
class Masked:
    """`score` where `keep` holds, and the result of a row where it never does."""

    score: sp.Expr
    keep: Boolean
    empty_row: EmptyRow


def split(logit: sp.Expr, finite: Callable[[str], bool] = lambda name: True, limit: float = float("inf")) -> Masked:
    """The logit as score and mask, exactly.

    `finite` says of a loaded tensor whether its values are finite for certain; `limit` is the largest finite score.
    A huge negative fill is a mask only above scores that are: where another mask makes all kept scores -inf, the
    filled ones take the whole weight.
    """
    logit = _overflowed(ex.canon(logit), limit)
    score, keep = _peel(logit, infinite=True)
    if keep != sp.true:
        return Masked(score, keep, EmptyRow.NAN)
    twice = _masked_twice(logit, limit)
    score, keep = twice or _peel(logit, infinite=False)
    loaded = [load for load in score.atoms(ex.Load) if not isinstance(load, ex.IntLoad)]
    if keep != sp.true and not twice and not _above(score, _fills(logit) - set(_branches(score))):
        return Masked(logit, sp.true, EmptyRow.NAN)
    if score.has(ex.NEG_INF) or not all(finite(load.args[0].name) for load in loaded):
        return Masked(logit, sp.true, EmptyRow.NAN)
    return Masked(score, keep, EmptyRow.UNIFORM if keep != sp.true and not twice else EmptyRow.NAN)


def _overflowed(logit: sp.Expr, limit: float) -> sp.Expr:
    """The logit with fills beyond what the scores can hold as the -inf that they are: twice finfo.min, for one."""
    if limit == float("inf"):
        return logit
    least = -sp.Rational(limit)
    tests = {w: ex.Where(w.args[0], *[ex.NEG_INF if x.is_Rational and x < least else x for x in w.args[1:]])
             for w in logit.atoms(ex.Where) if any(x.is_Rational and x < least for x in w.args[1:])}  # fmt: skip
    return ex.canon(logit.xreplace(tests)) if tests else logit


def _masked_twice(logit: sp.Expr, limit: float) -> tuple[sp.Expr, Boolean] | None:
    """Two finite fills that add up to -inf: what both masks drop is dropped for good, what one drops gets the fill."""
    if not isinstance(logit, sp.Add):
        return None
    parts = [(*_peel(t, infinite=False), t) for t in logit.args]
    masks = [(keep, _fills(term)) for _, keep, term in parts if keep != sp.true]
    if len(masks) != 2 or any(len(fills) != 1 for _, fills in masks):
        return None
    (one, (x,)), (other, (y,)) = masks
    if x != y or -(x + y) <= limit:
        return None
    score = ex.Where(sp.And(one, other), sp.Add(*[score for score, _, _ in parts]), x)
    return score, ex.canon(sp.Or(one, other))


def _above(score: sp.Expr, fills: set[sp.Expr]) -> bool:
    """Whether every score is above the fills for certain, so that what is filled counts in an empty row only."""
    if isinstance(score, ex.Where):
        return all(_above(x, fills) for x in score.args[1:])
    if score.is_number and abs(score) >= _LARGE:
        return bool(fills) and all(score >= fill * _CLEAR for fill in fills)
    return not any(abs(x) >= _LARGE for x in score.atoms(sp.Rational))


def _branches(score: sp.Expr) -> list[sp.Expr]:
    """What a chain of tests at the head of the score chooses from."""
    return [y for x in score.args[1:] for y in _branches(x)] if isinstance(score, ex.Where) else [score]


def _fills(term: sp.Expr) -> set[sp.Expr]:
    return {x for where in term.atoms(ex.Where) for x in where.args[1:] if _fill(x, infinite=False)}


def absorbed(total: sp.Expr, eps: float) -> sp.Expr:
    """A sum in a dtype of sixteen bits, with the rounding that a fill such as finfo.min or -1e4 does to a score.

    `eps` is the dtype's. A row whose keys are all filled is uniform in the source because the fill takes the scores'
    digits; kept as `s + fill` in higher precision it would be the softmax of the scores.
    """
    constant = sp.Add(*[t for t in sp.Add.make_args(total) if t.is_number])
    for term in sp.Add.make_args(total):
        test = ex.canon(constant + term)  # `(1 - mask)*fill` reads `fill - fill*mask`
        if not isinstance(test, ex.Where) or 0 not in test.args[1:]:
            continue
        c, x, y = test.args
        fill, rest = (x if y == 0 else y), total - term - constant
        if fill.is_number and fill.is_finite and HUGE < fill <= _COARSE:
            unit = sp.Rational(eps) * 2 ** (int(abs(fill)).bit_length() - 1)
            rounded = ex.Snap(rest, unit) + fill
            return ex.Where(c, rest, rounded) if x == 0 else ex.Where(c, rounded, rest)
    return total


def _peel(logit: sp.Expr, infinite: bool) -> tuple[sp.Expr, Boolean]:
    """Take the masks of one kind off the top of the expression."""
    if isinstance(logit, ex.Where):
        return _peel_where(logit, infinite)
    if isinstance(logit, sp.Add):
        parts = [_peel(t, infinite) for t in logit.args]
        masks = [keep for _, keep in parts if keep != sp.true]
        # Two finite masks add up to -inf in float32: which rows are empty then depends on both, so they stay data.
        if not infinite and len(masks) != 1:
            return logit, sp.true
        return sp.Add(*[score for score, _ in parts]), sp.And(*masks)
    if isinstance(logit, sp.Mul) and infinite:
        factor, rest = logit.as_coeff_Mul()
        if factor.is_positive and factor != 1:
            score, keep = _peel(rest, infinite)
            return factor * score, keep
    return logit, sp.true


def _peel_where(logit: ex.Where, infinite: bool) -> tuple[sp.Expr, Boolean]:
    c, x, y = logit.args
    if _fill(y, infinite):
        score, keep = _peel(x, infinite) if infinite or _same_fill(x, y) else (x, sp.true)
        return score, sp.And(c, keep)
    if _fill(x, infinite):
        score, keep = _peel(y, infinite) if infinite or _same_fill(y, x) else (y, sp.true)
        return score, sp.And(sp.Not(c), keep)
    parts = [_peel(branch, infinite) for branch in (x, y)] if infinite else []
    if any(keep != sp.true for _, keep in parts):
        (x, kept), (y, other) = parts
        return ex.Where(c, x, y), sp.Or(sp.And(c, kept), sp.And(sp.Not(c), other))
    return logit, sp.true


def _same_fill(inner: sp.Expr, fill: sp.Expr) -> bool:
    return isinstance(inner, ex.Where) and fill in inner.args[1:]


def _fill(x: sp.Expr, infinite: bool) -> bool:
    if infinite:
        return x == ex.NEG_INF
    return bool(x.is_number and x.is_finite and x <= HUGE)
