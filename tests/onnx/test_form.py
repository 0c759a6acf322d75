"""Which specs have a scale, a soft-cap, a bias and a mask, and which have not."""

from __future__ import annotations

import math

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.onnx.form import CAUSAL, Form, always, form_of
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise, Select, Softmax
from tests.specs import CASES

HEADS = Heads(4, 2, 2, 8, 8)
_BIAS = ex.load("bias", ex.h, ex.q, ex.k)


def _form(**parts: object) -> Form:
    form = form_of(AttentionSpec(HEADS, **parts))
    assert isinstance(form, Form), form
    return form


def test_scale_cap_and_bias_are_told_apart() -> None:
    form = _form(score=50 * sp.tanh(ex.s / 800) + _BIAS)
    assert (form.scale, form.cap, form.bias, form.factor) == (0.0625, 50.0, _BIAS, 1)
    assert form.loads
    assert _form(score=ex.s / 8).scale == 0.125


def test_what_varies_by_query_or_sign_goes_to_the_queries() -> None:
    gain = ex.load("gain", ex.h)
    form = _form(score=-ex.s * gain / 4)
    assert (form.scale, form.factor) == (0.25, -gain)


@pytest.mark.parametrize(
    "parts",
    [
        {"score": ex.s * ex.load("gain", ex.k)},
        {"score": ex.Where(sp.Ge(2 - ex.k, 0), ex.s, -10000)},
        {"score": sp.tanh(ex.s + _BIAS)},
        {"score": _BIAS},
        {"weight": ex.load("gain", ex.k)},
        {"normalizer": Pointwise()},
        {"dropout": 0.5},
        {"returns": ("lse",)},
        {"select": Select("topk", (sp.Integer(2),))},
    ],
    ids=str,
)
def test_what_no_operator_says_has_a_reason(parts: dict[str, object]) -> None:
    reason = form_of(AttentionSpec(HEADS, captures=(Capture("gain", "float", (None,)),), **parts))
    assert isinstance(reason, str)
    assert len(reason) > 15


def test_causal_and_windows_are_named() -> None:
    assert _form(keep=CAUSAL).causal
    window = _form(keep=sp.And(CAUSAL, sp.Ge(ex.k - ex.q + 19, 0)))
    assert (window.causal, window.window) == (False, 20)
    assert _form(keep=sp.And(CAUSAL, sp.Ge(ex.k - ex.q - 1, 0))).window == 0
    assert _form(keep=sp.Ge(ex.q - ex.k + 3, 0)).window == 0


def test_rows_that_keep_a_key_are_proven() -> None:
    padding = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)
    assert always(CAUSAL, sp.S.Zero)
    assert always(sp.And(CAUSAL, sp.Ge(ex.k - ex.q + 3, 0)), ex.q)
    assert not always(sp.And(CAUSAL, sp.Ge(ex.k - ex.q + 3, 0)), sp.S.Zero)
    assert not always(sp.And(CAUSAL, padding), sp.S.Zero)


def test_grouping_is_that_of_onnx() -> None:
    assert _form().grouped
    assert not form_of(AttentionSpec(Heads(4, 2, 2, 8, 8, (0, 1, 0, 1), (0, 1, 0, 1)))).grouped
    assert not form_of(AttentionSpec(Heads(4, 2, 4, 8, 8))).grouped


def test_a_form_says_what_its_spec_says() -> None:
    """At random numbers for scores and biases, for every case of the conformance list that has a form."""
    known = [(c, form_of(c.spec)) for c in CASES]
    formed = [(c, f) for c, f in known if isinstance(f, Form)]
    assert len(formed) >= 20
    for case, form in formed:
        score, s = case.spec.score, 1.7
        capped = (
            form.cap * sp.tanh(form.scale * form.factor * s / form.cap) if form.cap else form.scale * form.factor * s
        )
        difference = (score.subs(ex.s, s) - capped - form.bias).replace(ex.Load, lambda *a: sp.Rational(3, 7))
        symbols = {x: 2 for x in difference.free_symbols}
        assert math.isclose(float(difference.subs(symbols).doit()), 0.0, abs_tol=1e-9), case.name


def test_a_sink_that_varies_by_query_is_told() -> None:
    assert not _form(normalizer=Softmax(sink=ex.load("sink", ex.h))).sink_varies
    assert _form(normalizer=Softmax(sink=ex.load("sink", ex.h, ex.q))).sink_varies
