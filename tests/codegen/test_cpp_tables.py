"""Gradients of loaded tables: where they go, in which type, under which conditions, and where there are none."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.cpp_tables import conditions, copy_holes, sum_type, unplaced
from attnopt.spec import Capture
from tests.specs import case

LINE = ex.load("line", ex.q - ex.k)


def test_conditions_of_a_load() -> None:
    causal = ex.k <= ex.q
    assert conditions(ex.Where(causal, LINE, 0) + ex.s, LINE) == [causal]
    assert conditions(ex.Where(causal, 0, LINE), LINE) == [sp.Not(causal)]
    assert conditions(ex.Where(causal, LINE, 0) + LINE, LINE) is None
    assert conditions(ex.s, LINE) == []


def test_long_sums_are_taken_in_double() -> None:
    assert sum_type(case("bias").spec, "bias") == "float"
    assert sum_type(case("line").spec, "line") == "float"
    for name, capture in (("alibi", "slope"), ("buckets", "table"), ("sink", "sink"), ("guarded", "line")):
        assert sum_type(case(name).spec, capture) == "double"


def test_what_has_no_place_is_refused() -> None:
    assert unplaced(case("bias").spec, ["bias"]) is None
    assert "whole row" in str(unplaced(case("gate").spec, ["gain"]))
    assert unplaced(case("gate").spec, []) is None
    nested = ex.Where(ex.k <= ex.q, ex.load("x", ex.load("at", ex.k, integer=True)), 0)
    captures = (Capture("x", "float", (None,)), Capture("at", "int", (None,)))
    assert "under a condition" in str(
        unplaced(replace(case("plain").spec, score=ex.s + nested, captures=captures), ["x"])
    )


def test_tables_of_own_heads_need_no_copies() -> None:
    holes = copy_holes(case("bias").spec, ["bias"])
    assert "grad_bias_alone = threads == 1 || (true && w.step == a.n_b);" in holes["COPIES"]
    assert holes["TABLES"] == "  float* grad_bias;"
    assert (
        "grad_slope_alone = threads == 1 || (w.splits == 1 && w.step == a.n_b);"
        in copy_holes(case("alibi").spec, ["slope"])["COPIES"]
    )
    assert copy_holes(case("plain").spec, [])["JOIN"] == ""
