"""A mixed normaliser comes apart into a softmax window and a causal linear attention, or not at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.mixed_form import mixed_form
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Mixed, Pointwise, Softmax

GAP = ex.q - ex.k
PAD = (Capture("pad", "bool", (None, None)),)
KEPT = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)
SPEC = AttentionSpec(
    Heads(4, 2, 2, 20, 8), ex.s / 4, sp.And(GAP >= 0, KEPT), Mixed(GAP < 16, 12), empty_row=EmptyRow.ZERO, captures=PAD,
    gate=sp.Rational(1, 2),
)  # fmt: skip


def test_the_parts() -> None:
    form = mixed_form(SPEC)
    assert form is not None
    assert (form.width, form.window, form.offset, form.scale) == (8, 16, 0, sp.Rational(1, 4))
    assert form.near == replace(
        SPEC, heads=Heads(4, 2, 2, 8, 8), normalizer=Softmax(), keep=ex.canon(sp.And(GAP >= 0, GAP < 16, KEPT)),
        returns=("lse",), gate=sp.S.One,
    ).canonical()  # fmt: skip
    assert form.far.normalizer == Pointwise(ex.Maximum(ex.t, sp.Rational(1, 10**30)))
    assert form.far.heads.d_qk == 12
    assert form.linear.offset == -16
    AttentionSpec.parse(form.near.text)
    AttentionSpec.parse(form.far.text)


def test_queries_that_are_the_last_keys() -> None:
    place = ex.q + ex.n_k - ex.n_q
    form = mixed_form(replace(SPEC, keep=place >= ex.k, normalizer=Mixed(place - ex.k < 5, 12)))
    assert form is not None
    assert (form.offset, form.window) == (ex.n_k - ex.n_q, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": Softmax()},
        {"normalizer": Mixed(ex.k < 4, 12)},
        {"keep": sp.true},
        {"score": sp.tanh(ex.s)},
        {"empty_row": EmptyRow.NAN},
        {"returns": ("lse",)},
        {"normalizer": Mixed(GAP < 0, 12)},
    ],
    ids=str,
)
def test_what_has_no_such_form(changes: dict[str, Any]) -> None:
    assert mixed_form(replace(SPEC, **changes)) is None
