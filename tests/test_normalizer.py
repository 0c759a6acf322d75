"""Normalisers: their text, their words, and what a spec may put in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.analysis.forms import form
from attnopt.errors import SpecError
from attnopt.formula import formula
from attnopt.normalizer import Mixed, Pointwise, Softmax, normalizer_from_json, normalizer_to_json
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Heads

HEADS = Heads(2, 2, 2, 4, 4)
SIGMOID = AttentionSpec(HEADS, score=1 / (1 + sp.exp(-ex.s)), normalizer=Pointwise())
NORMALIZERS = [Softmax(), Softmax(sp.S.Zero), Pointwise(), Pointwise(ex.Maximum(ex.a, sp.S.One)), Pointwise(ex.t),
               Mixed(ex.canon(ex.q - ex.k < 4), 2)]  # fmt: skip


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)
def test_text_round_trip(normalizer: Softmax | Pointwise | Mixed) -> None:
    assert normalizer_from_json(normalizer_to_json(normalizer)) == normalizer
    spec = AttentionSpec(HEADS, normalizer=normalizer, weight=sp.sign(ex.s))
    assert AttentionSpec.parse(spec.text) == spec


def test_every_normalizer_has_a_key_of_its_own() -> None:
    assert len({AttentionSpec(HEADS, normalizer=n).key for n in NORMALIZERS}) == len(NORMALIZERS)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown normalizer 'sparsemax'"):
        normalizer_from_json({"kind": "sparsemax"})


def test_only_a_pointwise_normaliser_knows_the_sums() -> None:
    with pytest.raises(SpecError, match="score mentions t"):
        AttentionSpec(HEADS, score=ex.s * ex.t).verify()
    with pytest.raises(SpecError, match="divide mentions k"):
        AttentionSpec(HEADS, normalizer=Pointwise(ex.t + ex.k)).verify()


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7))  # type: ignore[return-value]


def test_sigmoid_weights_are_not_normalised() -> None:
    q, k, v = _inputs()
    torch.testing.assert_close(reference(SIGMOID, q, k, v)[0], torch.sigmoid(q @ k.mT) @ v)


def test_a_row_is_divided_by_its_sums() -> None:
    q, k, v = _inputs()
    spec = replace(SIGMOID, score=ex.s, keep=sp.Ge(ex.q - ex.k, 0), normalizer=Pointwise(ex.Maximum(ex.a, sp.S.One)))
    weights = (q @ k.mT).tril()
    expected = weights / weights.abs().sum(-1, keepdim=True).clamp_min(1) @ v
    torch.testing.assert_close(reference(spec, q, k, v)[0], expected)


def test_weights_carry_a_factor_after_the_softmax() -> None:
    q, k, v = _inputs()
    s = q @ k.mT
    spec = AttentionSpec(HEADS, score=sp.Abs(ex.s), weight=sp.sign(ex.s))
    torch.testing.assert_close(reference(spec, q, k, v)[0], (s.abs().softmax(-1) * s.sign()) @ v)


def test_terms_that_are_added_must_fit() -> None:
    spec = AttentionSpec(HEADS, merge=(AttentionSpec(HEADS, gate=sp.S.NegativeOne),))
    spec.verify()
    assert AttentionSpec.parse(spec.text) == spec
    assert len(spec.terms) == 2
    with pytest.raises(SpecError, match="must agree"):
        AttentionSpec(HEADS, merge=(AttentionSpec(Heads(3, 3, 3, 4, 4)),)).verify()


@pytest.mark.parametrize("normalizer", [Mixed(ex.q - ex.k, 2), Mixed(ex.q > ex.k, 0), Mixed(ex.q > ex.k, 99)], ids=str)
def test_a_mixed_normaliser_needs_a_condition_and_columns_for_both(normalizer: Mixed) -> None:
    with pytest.raises(SpecError, match="mixed normaliser"):
        AttentionSpec(HEADS, normalizer=normalizer).verify()


def test_a_mixed_normaliser_says_what_it_is() -> None:
    spec = AttentionSpec(HEADS, keep=ex.q >= ex.k, normalizer=Mixed(ex.q - ex.k < 4, 2)).canonical()
    assert "elsewhere linear over 2 features, in one sum" in str(spec)
    assert "2 columns of Q·K" in formula(spec)
    assert form(spec) == "softmax near, linear beyond"
    assert AttentionSpec.parse(spec.text).text == spec.text
