"""Which text goes by ranges, and which by lists. The results are compared in tests/runtime/test_lists.py."""

from __future__ import annotations

import pytest

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import Layout, Plan
from attnopt.codegen.cpp_lists import list_constants, list_fields, list_reads, visit_holes
from attnopt.codegen.cpp_plans import listed
from attnopt.spec import AttentionSpec, Heads

SPEC = AttentionSpec(Heads(2, 1, 1, 8, 8), score=ex.s / 3, keep=ex.k <= ex.q)


@pytest.mark.parametrize("plan", [Plan(), Plan(16, 32, 8, 8, "stream")], ids=lambda p: p.form)
def test_a_listed_plan_goes_by_its_list_alone(plan: Plan) -> None:
    text = cpp.emit(SPEC, Layout("float32"), listed(plan)).source
    assert "list[2 + i]" in text
    assert "!full" in text
    assert "@" not in text
    ranged = cpp.emit(SPEC, Layout("float32"), plan).source
    assert "kListK" not in ranged
    assert "bool full" not in ranged


def test_without_lists_there_is_nothing_of_them() -> None:
    assert not [*list_constants(Plan()), *list_fields(Plan()), *list_reads(Plan(), 3)]
    assert visit_holes(Plan()).keys() == visit_holes(listed(Plan())).keys()


def test_the_list_is_the_tensor_behind_the_captures() -> None:
    assert "tensors[5]" in list_reads(listed(Plan()), 5)[0]
