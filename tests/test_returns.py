"""Names of side outputs: which there are, which an attention has, and that they survive the spec's text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.returns import AGAIN, NOTHING, PAIRS, ROWS, SKIPPED, check, of_rows
from attnopt.spec import AttentionSpec, Heads, Pointwise

PLAIN = AttentionSpec(Heads(2, 2, 2, 8, 8))


def test_rows_keep_their_order() -> None:
    assert of_rows(("weights", "entropy", "column_mass", "lse")) == ("entropy", "lse")
    assert of_rows(()) == ()


def test_rows_that_are_left_out_have_no_weights() -> None:
    assert set(SKIPPED) == set(ROWS)
    assert math.exp(-SKIPPED["max"] - SKIPPED["log_sum"]) == 0.0
    assert NOTHING["lse"] == NOTHING["max"] + NOTHING["log_sum"]
    assert set(AGAIN) <= set(ROWS)


@pytest.mark.parametrize("name", [*ROWS, *PAIRS])
def test_every_side_output_is_part_of_the_text(name: str) -> None:
    spec = replace(PLAIN, returns=(name,))
    assert AttentionSpec.parse(spec.text).returns == (name,)
    assert spec.key != PLAIN.key


def test_the_line_of_a_spec_names_them() -> None:
    assert str(replace(PLAIN, returns=("lse", "entropy"))).endswith("; returns lse, entropy")
    assert "returns" not in str(replace(PLAIN, returns=("lse",)))


@pytest.mark.parametrize(
    ("returns", "softmax", "merged", "said"),
    [
        (("entropie",), True, False, "unknown side outputs"),
        (("lse", "lse"), True, False, "each once"),
        (("entropy",), True, True, "ask each of them"),
        (("lse", "entropy"), False, False, "entropy: only the weights of a softmax"),
    ],
)
def test_what_there_is_not_is_refused(returns: tuple[str, ...], softmax: bool, merged: bool, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        check(returns, softmax, merged)


def test_pointwise_weights_have_a_column_mass() -> None:
    spec = AttentionSpec(PLAIN.heads, score=ex.Maximum(ex.s, 0), normalizer=Pointwise(), returns=("lse", "column_mass"))
    spec.verify()
    with pytest.raises(SpecError, match="entropy"):
        replace(spec, returns=("entropy",)).verify()
