"""What is left of a spec where only its weights are wanted."""

from __future__ import annotations

from attnopt.analysis.plain import weights_of
from tests.specs import case


def test_what_comes_after_the_weights_is_gone() -> None:
    spec = weights_of(case("pointwise_gated").spec)
    assert (spec.weight, spec.gate, spec.returns, spec.dropout) == (1, 1, (), 0.0)
    assert spec.captures == case("pointwise_gated").spec.captures
    assert spec.keep == case("pointwise_gated").spec.canonical().keep


def test_side_outputs_do_not_tell_two_apart() -> None:
    assert weights_of(case("lse").spec).key == weights_of(case("entropy").spec).key
