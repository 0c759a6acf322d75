"""Parts of a Triton kernel: folded scales, head maps, what a function has to be given."""

from __future__ import annotations

from dataclasses import replace

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_parts import folded_scale, parts
from attnopt.spec import Pointwise
from tests.specs import case


def test_only_a_plain_positive_factor_is_folded() -> None:
    spec = case("scale").spec
    assert folded_scale(spec) == spec.score.coeff(ex.s, 1)
    for score in (-ex.s, ex.s + 1, ex.s * ex.q, ex.s**2):
        assert folded_scale(replace(spec, score=score)) is None
    assert folded_scale(replace(spec, normalizer=Pointwise())) is None
    assert folded_scale(case("sink").spec) is None


def test_masks_stand_under_masked_and_data_does_not() -> None:
    made = parts(case("padding_causal").spec.canonical(), Layout("float32", _layouts("padding_causal")))
    masked = next(i for i, line in enumerate(made.tile) if line == "if MASKED:")
    assert any("q >= k" in line for line in made.tile[masked:])
    assert any("pad_0" in line and not line.startswith(" ") for line in made.tile)
    assert made.state == ("m", "l")


def test_sums_are_kept_where_the_divisor_wants_them() -> None:
    spec = replace(case("plain").spec, normalizer=Pointwise(ex.Maximum(ex.a, 1))).canonical()
    assert parts(spec, Layout("float32")).state == ("total_abs",)
    assert parts(replace(spec, normalizer=Pointwise()), Layout("float32")).state == ()


def _layouts(name: str):  # type: ignore[no-untyped-def]
    from tests.codegen.test_triton import layout

    return layout(case(name).spec).captures
