"""Which operator is chosen, and what each of them refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.onnx.form import CAUSAL, form_of
from attnopt.onnx.operators import OPERATORS, Shape, candidates, guarded
from attnopt.spec import AttentionSpec, EmptyRow, Heads, Softmax

EQUAL, GROUPED, ODD = Heads(4, 4, 4, 8, 8), Heads(4, 2, 2, 8, 8), Heads(4, 4, 4, 6, 6)
SQUARE = Shape(torch.float32, True, True)
WINDOW = sp.And(CAUSAL, sp.Ge(ex.k - ex.q + 3, 0))
PADDED = sp.And(CAUSAL, sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0))
BIAS = ex.s + ex.load("bias", ex.h, ex.q, ex.k)
SINK = Softmax(sink=ex.load("sink", ex.h))


def _first(heads: Heads, shape: Shape = SQUARE, target: str = "ort", **parts: object) -> str:
    spec = AttentionSpec(heads, **parts)
    found, _ = candidates(spec, form_of(spec), shape, target)
    return found[0].name.split(".")[-1] if found else ""


@pytest.mark.parametrize(
    ("heads", "shape", "parts", "wanted"),
    [
        (EQUAL, SQUARE, {}, "MultiHeadAttention"),
        (EQUAL, SQUARE, {"keep": CAUSAL}, "GroupQueryAttention"),
        (ODD, SQUARE, {"keep": CAUSAL}, "MultiHeadAttention"),
        (GROUPED, SQUARE, {}, "Attention"),
        (GROUPED, SQUARE, {"keep": WINDOW}, "GroupQueryAttention"),
        (GROUPED, SQUARE, {"keep": PADDED}, "Attention"),
        (EQUAL, SQUARE, {"keep": PADDED}, "MultiHeadAttention"),
        (EQUAL, Shape(torch.float32), {"keep": CAUSAL}, "Attention"),
        (EQUAL, Shape(torch.float16), {}, "Attention"),
        (EQUAL, Shape(torch.float64), {}, ""),
        (EQUAL, SQUARE, {"score": BIAS}, "MultiHeadAttention"),
        (EQUAL, SQUARE, {"score": BIAS, "empty_row": EmptyRow.ZERO}, "Attention"),
        (EQUAL, SQUARE, {"normalizer": SINK}, "GroupQueryAttention"),
        (EQUAL, Shape(torch.float32), {"normalizer": SINK}, ""),
        (EQUAL, SQUARE, {"score": 20 * sp.tanh(ex.s / 20)}, "Attention"),
    ],
)
def test_the_first_operator_that_says_it(heads: Heads, shape: Shape, parts: dict[str, object], wanted: str) -> None:
    assert _first(heads, shape, **parts) == wanted
    assert _first(heads, shape, "onnx", **parts) in ("Attention", "")


def test_every_operator_that_refuses_says_why() -> None:
    spec = AttentionSpec(ODD, normalizer=Softmax(sink=ex.load("sink", ex.h, ex.q)))
    found, reasons = candidates(spec, form_of(spec), Shape(torch.bfloat16), "ort")
    assert not found
    assert len(reasons) == len(OPERATORS)
    assert all("bfloat16" in reason for reason in reasons)


def test_rows_that_may_be_empty_are_guarded() -> None:
    def form(**parts: object):
        return form_of(AttentionSpec(EQUAL, **parts))

    assert not guarded(form(), SQUARE)
    assert not guarded(form(keep=CAUSAL), Shape(torch.float32))
    assert not guarded(form(keep=WINDOW), SQUARE)
    assert guarded(form(keep=WINDOW), Shape(torch.float32))
    assert guarded(form(keep=PADDED), SQUARE)
    assert guarded(form(score=BIAS), SQUARE)
    assert guarded(replace(form(), loads=True), SQUARE)
