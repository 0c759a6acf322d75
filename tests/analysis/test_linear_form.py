"""Which specs are linear attention is proven from the spec; when it pays is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.linear_form import LinearForm, linear_form, multiplications, pays
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise, Softmax

CAUSAL = sp.Ge(ex.q - ex.k, 0)
PAD = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)
RATE, BY_Q, BY_K = ex.load("rate", ex.h), ex.load("row", ex.b, ex.h, ex.q), ex.load("column", ex.k)
CAPTURES = (
    Capture("pad", "bool", (None, None)), Capture("rate", "float", (4,)), Capture("row", "float", (None, 4, None)),
    Capture("column", "float", (None,)), Capture("pair", "float", (None, None)),
)  # fmt: skip
GAP = ex.q - ex.k


def spec(score: sp.Expr, keep: sp.Basic = sp.true, divide: sp.Expr = sp.S.One) -> AttentionSpec:
    made = AttentionSpec(Heads(4, 4, 4, 8, 8), score, keep, Pointwise(divide), captures=CAPTURES)
    made.verify()
    return AttentionSpec.parse(made.text)


LINEAR = (
    (spec(ex.s), LinearForm(sp.S.One, sp.S.One)),
    (spec(ex.s / 3, divide=ex.t + 1), LinearForm(sp.Rational(1, 3), sp.S.One)),
    (spec(ex.s * BY_Q * BY_K), LinearForm(BY_Q, BY_K)),
    (spec(ex.s, CAUSAL, sp.Abs(ex.t)), LinearForm(sp.S.One, sp.S.One, offset=sp.S.Zero)),
    (spec(ex.s, sp.Ge(GAP + ex.n_k - ex.n_q, 0)), LinearForm(sp.S.One, sp.S.One, offset=ex.n_k - ex.n_q)),
    (spec(ex.s, PAD), LinearForm(sp.S.One, ex.Where(PAD, sp.S.One, sp.S.Zero))),
    (spec(ex.s * sp.exp(-RATE * GAP), CAUSAL), LinearForm(sp.S.One, sp.S.One, -RATE, sp.S.Zero)),
    (spec(ex.s * sp.exp(-RATE * ex.Maximum(GAP, sp.S.Zero)), CAUSAL), LinearForm(sp.S.One, sp.S.One, -RATE, sp.S.Zero)),
    (spec(ex.s * sp.exp(BY_Q - BY_K), CAUSAL), LinearForm(sp.S.One, sp.S.One, offset=sp.S.Zero, line=(BY_Q, BY_K))),
)


@pytest.mark.parametrize(("given", "form"), LINEAR, ids=lambda x: str(x) if isinstance(x, AttentionSpec) else "")
def test_the_factors_are_found(given: AttentionSpec, form: LinearForm) -> None:
    assert linear_form(given) == form
    assert form.causal == (given.keep not in (sp.true, PAD))


OTHERS = (
    replace(spec(ex.s), normalizer=Softmax()),
    spec(ex.Maximum(ex.s, sp.S.Zero)),
    spec(ex.s + 1),
    spec(ex.s * ex.load("pair", ex.q, ex.k), CAUSAL),
    spec(ex.s, divide=ex.a),
    spec(ex.s * sp.exp(-RATE * GAP)),  # a decay without a mask grows without bound
    spec(ex.s * sp.exp(-(GAP**2)), CAUSAL),
    spec(ex.s * sp.exp(BY_Q - BY_K)),  # nor may one that is data
    spec(ex.s * sp.exp(BY_Q * BY_K), CAUSAL),
    spec(ex.s * sp.exp(BY_Q - BY_K - RATE * GAP) * sp.exp(sp.Abs(GAP)), CAUSAL),
    spec(ex.s, sp.Ge(ex.k - ex.q, 0)),
    spec(ex.s, sp.And(CAUSAL, sp.Ge(4 - GAP, 0))),
    spec(ex.s, sp.Or(CAUSAL, PAD)),
    replace(spec(ex.s), weight=BY_K),
    replace(spec(ex.s), dropout=0.5),
)


@pytest.mark.parametrize("given", OTHERS, ids=str)
def test_everything_else_has_no_linear_form(given: AttentionSpec) -> None:
    assert linear_form(given) is None


def test_it_pays_where_the_keys_outnumber_the_features() -> None:
    given = spec(ex.s)
    direct, linear = multiplications(given, 1000, 1000, causal=False)
    assert (direct, linear) == (1000 * 1000 * 16, 8 * 9 * 2000)
    assert pays(given, 1000, 1000, causal=False)
    assert not pays(given, 8, 8, causal=False)
    assert not pays(given, 1, 4096, causal=True)  # a single query reads each key once
    assert multiplications(given, 1000, 1000, causal=True)[0] == direct // 2
