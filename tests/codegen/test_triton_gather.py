"""Rows that are computed, in Triton: the text of the two kernels. Their results are those of the conformance list."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt.aot.standard import layout_for
from attnopt.codegen import triton
from attnopt.codegen.triton_gather import gathers, wanted_rows
from attnopt.codegen.triton_plans import TritonPlan
from tests.specs import case

SPEC = case("routed").spec.canonical()
LAYOUT = layout_for(SPEC, "bfloat16")
PLAN = TritonPlan(64, 64, 4, 2)


def test_two_kernels_one_that_lists_and_one_that_reads_the_list() -> None:
    kernel = triton.emit(SPEC, LAYOUT, PLAN)
    assert [e.name for e in kernel.entries] == ["attention_rows", "attention_forward"]
    for entry in kernel.entries:
        assert {"places_ptr", "counts_ptr"} <= {a.name for a in entry.arguments}
    assert "if place >= listed:\n        return" in kernel.source
    assert "keys" not in {a.of for a in kernel.entries[0].arguments}


def test_nothing_of_it_where_all_rows_are_computed() -> None:
    whole = replace(SPEC, rows=sp.true)
    assert gathers(SPEC)
    assert not gathers(whole)
    assert wanted_rows(whole, LAYOUT, "wanted") == []
    kernel = triton.emit(whole, LAYOUT, PLAN)
    assert [e.name for e in kernel.entries] == ["attention_forward"]
    assert "places" not in kernel.source


def test_decode_and_gradients_mask_the_rows() -> None:
    assert "tl.where(wanted, result, 0.0)" in triton.emit_decode(SPEC, LAYOUT, PLAN).source
    assert "rows_inside = rows_inside & wanted" in triton.emit_backward(SPEC, LAYOUT, PLAN).source
