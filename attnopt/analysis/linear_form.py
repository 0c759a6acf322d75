"""Whether an attention is linear: its weights a product of one factor by query and one by key. Free of torch.

Then `sum_k w(q,k) v[k]` is `f(q) q . sum_k g(k) k v[k]`: the cost grows with the length, not with its square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Pointwise

# Queries of one chunk see one another's keys directly; everything before is one state.
CHUNK = 64
# The linear form runs where this many times its multiplications are no more than the direct form's.
_GAIN = 1


@dataclass(frozen=True)
class LinearForm:
    """`weight = s * query * key * exp(rate*(q - k))` over all keys, or over those with `k <= q + offset`.

    `query` is an expression in `b, h, q`, `key` in `b, h, k` and `rate` in `b, h`; `offset` (of causal forms) is one
    in sizes and scalars, None where all keys are kept. Where each place has a decay of its own, `line` is a pair of
    expressions in `b, h, q` and in `b, h, k`, and `exp(line[0] - line[1])` stands for the exponential.
    """

    query: sp.Expr
    key: sp.Expr
    rate: sp.Expr = sp.S.Zero
    offset: sp.Expr | None = None
    line: tuple[sp.Expr, sp.Expr] | None = None

    @property
    def causal(self) -> bool:
        """Whether a query sees only the keys up to its own place."""
        return self.offset is not None


def linear_form(spec: AttentionSpec) -> LinearForm | None:
    """The factors of a spec's weights; None where it is not proven to have such."""
    normalizer = spec.normalizer
    if (
        not isinstance(normalizer, Pointwise)
        or spec.weight != 1
        or spec.dropout
        or spec.merge
        or spec.returns
        or spec.select
        or spec.rows != sp.true
    ):
        return None
    if normalizer.divide.has(ex.a):
        return None
    factor = spec.score / ex.s
    if factor.has(ex.s) or factor.has(sp.oo, ex.NEG_INF, sp.nan):
        return None
    if sp.Ge(ex.q - ex.k, 0) in ex.conjuncts(spec.keep):
        gap = ex.q - ex.k
        factor = factor.xreplace({ex.Maximum(gap, sp.S.Zero): gap, ex.Maximum(sp.S.Zero, gap): gap, sp.Abs(gap): gap})
    form = _factors(factor)
    return None if form is None else _masked(form, spec.keep)


def _factors(factor: sp.Expr) -> LinearForm | None:
    form = LinearForm(sp.S.One, sp.S.One)
    for part in sp.Mul.make_args(factor):
        over = ex.depends(part, ex.q), ex.depends(part, ex.k)
        if over == (True, True):
            rate, line = _rate(part), _line(part)
            if rate is not None:
                form = replace(form, rate=form.rate + rate)
            elif line is not None and form.line is None:
                form = replace(form, line=line)
            else:
                return None
        elif over[1]:
            form = replace(form, key=form.key * part)
        else:
            form = replace(form, query=form.query * part)
    return form if form.rate == 0 or form.line is None else None


def _rate(part: sp.Expr) -> sp.Expr | None:
    """`c` of `exp(c*(q - k))`."""
    if not isinstance(part, sp.exp):
        return None
    rate = sp.cancel(part.args[0] / (ex.q - ex.k))
    return None if ex.depends(rate, ex.q, ex.k) else rate


def _line(part: sp.Expr) -> tuple[sp.Expr, sp.Expr] | None:
    """`f` and `g` of `exp(f(q) - g(k))`: a difference of loaded terms, which kernels take apart at places near by."""
    if not isinstance(part, sp.exp):
        return None
    by_query = by_key = sp.S.Zero
    for term in sp.Add.make_args(sp.expand(part.args[0])):
        over = ex.depends(term, ex.q), ex.depends(term, ex.k)
        if over == (True, True):
            return None
        by_query, by_key = (by_query, by_key - term) if over[1] else (by_query + term, by_key)
    return by_query, by_key


def _masked(form: LinearForm, keep: Boolean) -> LinearForm | None:
    """The form with the mask: causal, or one of the keys alone."""
    for clause in ex.conjuncts(keep):
        if not ex.depends(clause, ex.q):
            form = replace(form, key=form.key * ex.Where(clause, sp.S.One, sp.S.Zero))
            continue
        offset = clause.args[0] - ex.q + ex.k if isinstance(clause, sp.Ge) and clause.args[1] == 0 else None
        known = offset is not None and not offset.has(ex.Load) and not ex.depends(offset, *ex.COORDINATES)
        if not known:
            return None
        gap = sp.S.One if form.offset is None else sp.expand(offset - form.offset)
        if not gap.is_number:
            return None
        # Of two bounds the tighter one holds.
        form = replace(form, offset=offset) if form.offset is None or gap < 0 else form
    return form if form.causal or (form.rate == 0 and form.line is None) else None


def multiplications(spec: AttentionSpec, n_q: int, n_k: int, causal: bool) -> tuple[int, int]:
    """How many a head needs: over all pairs of queries and keys, and in the linear form."""
    d_qk, d_v = spec.heads.d_qk, spec.heads.d_v
    direct = n_q * n_k * (d_qk + d_v)
    states = d_qk * (d_v + 1) * (n_q + n_k)
    if not causal:
        return direct, states
    return direct // 2, states + max(n_q, n_k) * CHUNK * (d_qk + d_v)


def pays(spec: AttentionSpec, n_q: int, n_k: int, causal: bool) -> bool:
    """Whether the linear form is the cheaper one at these lengths."""
    direct, linear = multiplications(spec, n_q, n_k, causal)
    return _GAIN * linear <= direct
