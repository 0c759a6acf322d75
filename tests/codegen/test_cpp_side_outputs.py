"""Side outputs of rows in C++ text: nothing where they are not asked, all of them next to one another where they are."""

from __future__ import annotations

import pytest

from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Layout, Plan
from attnopt.codegen.cpp_side_outputs import skipped_row, spends, spent_holes, stored
from tests.specs import case

FORMS = (Plan(), Plan(48, 64, 8, 4, "whole"), Plan(16, 32, 8, 8, "stream"))


def _source(name: str, plan: Plan) -> str:
    spec = case(name).spec
    return cpp.emit(spec, Layout("float32", tuple(CaptureLayout("float32", 1) for _ in spec.captures)), plan).source


@pytest.mark.parametrize("plan", FORMS, ids=[p.form for p in FORMS])
def test_entropy_is_summed_in_every_form(plan: Plan) -> None:
    made = _source("entropy", plan)
    assert "spent += select(to_bool(p != 0.0f)" in made
    assert "known[1] = empty ? " in made
    assert "@" not in made
    plain = _source("lse", plan)
    assert "spent" not in plain
    assert "t.grow" not in plain
    assert "known" not in plain


def test_parts_of_the_keys_meet() -> None:
    assert "part.size + (part.max - shift) * part.sum" in _source("entropy", FORMS[2])


def test_holes_are_the_same_whether_filled_or_not() -> None:
    asked, not_asked = case("entropy").spec, case("lse").spec
    assert (spends(asked), spends(not_asked)) == (True, False)
    assert set(spent_holes(asked)) == set(spent_holes(not_asked))
    assert set(spent_holes(not_asked).values()) == {""}
    assert stored(not_asked, "x") == "  if (a.lse) a.lse[(b * kHeads + h) * n_q + q] = x;"


def test_rows_that_are_not_computed() -> None:
    assert skipped_row(case("routed").spec) == "    if (a.lse) a.lse[item * a.n_q + q] = -INFINITY;"
    lines = skipped_row(case("entropy_routed").spec).splitlines()
    assert [line.split(" = ")[1] for line in lines[2:-1]] == ["-INFINITY;", "0.0f;", "0.0f;", "INFINITY;"]
