"""The name of a spec's form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.forms import form
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise

HEADS = Heads(2, 2, 2, 4, 4)
SOFTMAX = AttentionSpec(HEADS)
SIGMOID, RELU = 1 / (1 + sp.exp(-ex.s)), ex.Maximum(ex.s / 2, sp.S.Zero)
ROUTED = replace(SOFTMAX, gate=ex.load("gate", ex.b, ex.h, ex.q), captures=(Capture("gate", "float", (None, 2, None)),))
GAIN = replace(SOFTMAX, gate=ex.load("gate", ex.h), captures=(Capture("gate", "float", (2,)),))
CAUSAL = sp.Ge(ex.q - ex.k, 0)


def pointwise(score: sp.Expr, **more: object) -> AttentionSpec:
    return AttentionSpec(HEADS, score, normalizer=Pointwise(), **more)  # type: ignore[arg-type]


def added(*gates: sp.Expr) -> AttentionSpec:
    first, *others = (replace(SOFTMAX, gate=gate) for gate in gates)
    return replace(first, merge=tuple(others))


NAMES = (
    (SOFTMAX, "softmax"),
    (GAIN, "softmax"),
    (ROUTED, "mixture of heads"),
    (replace(SOFTMAX, score=sp.Abs(ex.s), weight=sp.sign(ex.s)), "signed"),
    (pointwise(SIGMOID / 7), "sigmoid"),
    (pointwise(RELU), "relu"),
    (pointwise(RELU**2), "squared relu"),
    (pointwise(ex.Maximum(ex.s, sp.S.Zero) + sp.log(1 + sp.exp(-sp.Abs(ex.s)))), "softplus"),
    (pointwise(sp.tanh(ex.s)), "tanh"),
    (pointwise(ex.s * SIGMOID), "silu"),
    (pointwise(ex.s * (1 + sp.erf(ex.s))), "gelu"),
    (pointwise(sp.exp(ex.s)), "exponential"),
    (pointwise(ex.s), "linear"),
    (pointwise(ex.s * sp.exp(-(ex.q - ex.k) / 9), keep=CAUSAL), "linear with decay"),
    (pointwise(ex.s, keep=sp.Ge(ex.k - ex.q, 0)), "bilinear"),
    (pointwise(ex.s**3), "pointwise"),
    (added(sp.S.One, -sp.Rational(1, 3)), "differential"),
    (added(sp.S.One, sp.Rational(1, 3)), "decoupled"),
    (added(sp.Rational(1, 2), sp.Rational(1, 2)), "average"),
)


@pytest.mark.parametrize(("spec", "name"), NAMES, ids=[f"{n}_{i}" for i, (_, n) in enumerate(NAMES)])
def test_form_is_named(spec: AttentionSpec, name: str) -> None:
    spec.verify()
    assert form(AttentionSpec.parse(spec.text)) == name
