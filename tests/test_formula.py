"""Specs as mathematics, and masks in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt import expr as ex
from attnopt.formula import formula, mask_in_words
from attnopt.normalizer import Pointwise, Softmax
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads

PLAIN = AttentionSpec(Heads(4, 4, 4, 8, 8), score=ex.s / 4)
BIAS = (Capture("bias", "float", (4,)),)
CASES = (
    (PLAIN, "sum of softmax(s/4) * V[b, h, k] over k, with s = Q[b, h, q]·K[b, h, k]"),
    (
        replace(PLAIN, heads=Heads(4, 2, 1, 8, 8), keep=ex.canon(ex.k <= ex.q)),
        "sum of softmax(s/4) * V[b, 0, k] over k where k <= q, with s = Q[b, h, q]·K[b, h//2, k]",
    ),
    (
        replace(PLAIN, heads=Heads(4, 2, 2, 8, 8, (1, 0, 1, 0), (0, 1, 0, 1))),
        "sum of softmax(s/4) * V[b, value_head[h], k] over k, with s = Q[b, h, q]·K[b, key_head[h], k]",
    ),
    (
        replace(PLAIN, normalizer=Softmax(ex.load("bias", ex.h)), captures=BIAS, gate=ex.load("bias", ex.h)),
        "bias[h] * (sum of softmax(s/4; sink bias[h]) * V[b, h, k] over k), with s = Q[b, h, q]·K[b, h, k]",
    ),
    (
        replace(PLAIN, score=ex.s + 1, normalizer=Pointwise(ex.n_k), weight=ex.k + 1),
        "(sum of (s + 1) * (k + 1) * V[b, h, k] over k) / n_k, with s = Q[b, h, q]·K[b, h, k]",
    ),
    (
        replace(PLAIN, merge=(replace(PLAIN, score=ex.s),)),
        "sum of softmax(s/4) * V[b, h, k] over k, with s = Q[b, h, q]·K[b, h, k]"
        " + sum of softmax(s) * V[b, h, k] over k, with s = Q[b, h, q]·K[b, h, k]",
    ),
)


@pytest.mark.parametrize(("spec", "text"), CASES)
def test_formula(spec: AttentionSpec, text: str) -> None:
    assert formula(spec) == f"out[b, h, q] = {text}"


def test_mask_in_words() -> None:
    causal = replace(PLAIN, keep=ex.canon(ex.k <= ex.q), empty_row=EmptyRow.ZERO)
    assert mask_in_words(PLAIN) == "every query attends to every key"
    assert mask_in_words(causal).startswith("causal")
    assert mask_in_words(causal).endswith("; a row without any key gives zeros")
    assert "row without" not in mask_in_words(replace(causal, normalizer=Pointwise()))
