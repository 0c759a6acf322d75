"""Side outputs of rows in Triton's text: what is kept, joined and stored; nothing where they are not asked."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from attnopt.codegen import triton
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_rows import described, launched, left_out, logged, replaced, spent, spent_apart, state_of
from attnopt.spec import EmptyRow
from tests.codegen.test_triton import layout
from tests.specs import OBSERVED, case

PLAN = TritonPlan(32, 32, 4, 2)


def test_a_spec_without_them_has_the_text_that_it_had() -> None:
    plain = case("causal").spec
    assert state_of(plain) == ("m", "l")
    assert spent(plain, "x") == spent_apart(plain) == logged(plain, "x", True) == left_out(plain, "row", "mask") == []
    assert launched(plain) == ([], "None")
    assert described(plain) == described(case("lse").spec) == "lse [B, 4, n_q] or None."


def test_entropy_is_a_third_number_of_the_state() -> None:
    spec = case("entropy").spec
    assert state_of(spec) == ("m", "l", "u")
    made = triton.emit_decode(spec, layout(spec), PLAN).source
    assert "state_ptr + place * 3 + 2, u" in made
    assert "u_part" in made
    assert "lse_ptr + ((tl.cast(b, tl.int64) * HEADS + h) * n_q + q) * 2 + 1, entropy" in made
    assert described(spec) == "lse, entropy [B, 4, n_q, 2]."


@pytest.mark.parametrize(("policy", "fill"), [(EmptyRow.NAN, 'float("nan")'), (EmptyRow.UNIFORM, "n_k)")])
def test_rows_without_keys(policy: EmptyRow, fill: str) -> None:
    spec = replace(case("entropy").spec, empty_row=policy)
    assert fill in logged(spec, "log", False)[1]


def test_rows_that_are_left_out() -> None:
    spec = case("entropy_routed").spec
    lines = left_out(spec, "row", "skipped")
    assert [x in lines[i] for i, x in enumerate(('float("-inf")', "0.0", "0.0", 'float("inf")'))] == [True] * 4
    assert replaced(spec)[0] == 'lse = tl.where(wanted, lse, float("-inf"))'


def test_a_maximum_that_others_measure_from_is_a_logit() -> None:
    spec = replace(case("scale").spec, returns=("max", "log_sum"))
    assert "SCALE_LOG2E" not in triton.emit(spec, layout(spec), PLAN).source
    assert "SCALE_LOG2E" in triton.emit(replace(spec, returns=("entropy",)), layout(spec), PLAN).source


@pytest.mark.parametrize("item", OBSERVED, ids=str)
def test_text_is_python(item: object) -> None:
    spec = item.spec  # type: ignore[attr-defined]
    for emit in (triton.emit, triton.emit_decode):
        ast.parse(emit(spec, layout(spec, "bfloat16"), PLAN).source)
