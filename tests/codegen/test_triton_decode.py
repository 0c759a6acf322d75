"""Split-KV decode: which heads share a tile, and what the kernels hand over."""

from __future__ import annotations

import ast

import pytest

from attnopt.codegen import triton
from attnopt.codegen.triton_decode import decode, group
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.spec import Heads
from tests.codegen.test_triton import layout
from tests.specs import case, with_heads


@pytest.mark.parametrize(
    ("name", "rows"), [("gqa", 4), ("plain", 1), ("head_table", 1), ("gqa_group_of_three", 3), ("width_96", 2)]
)
def test_the_heads_of_a_group_are_rows_of_one_tile(name: str, rows: int) -> None:
    assert group(case(name).spec.canonical()) == rows


def test_ranges_that_depend_on_the_head_are_not_shared() -> None:
    item = with_heads(case("window_per_head"), Heads(4, 2, 2, 32, 32))
    assert group(item.spec.canonical()) == 1


def test_a_sink_joins_once() -> None:
    spec = case("sink").spec.canonical()
    text, split, combine = decode(spec, layout(spec))
    first, second = text.split("def attention_combine(")
    assert "+ sink_" not in first
    assert "+ sink_" in second
    assert [a.name for a in split if a.of in ("sums", "state")] == ["sums_ptr", "state_ptr"]
    assert not [a for a in split if a.of in ("out", "lse")]
    assert [a.name for a in combine if a.kind == "size"] == ["n_b", "n_q", "n_k", "n_splits"]


@pytest.mark.parametrize("name", ["gqa", "empty_uniform", "window", "guarded"])
def test_text_is_python(name: str) -> None:
    spec = case(name).spec
    made = triton.emit_decode(spec, layout(spec, "bfloat16"), TritonPlan(16, 64, 4, 3))
    assert "decode" in (ast.get_docstring(ast.parse(made.source)) or "")
    assert [e.name for e in made.entries] == ["attention_split", "attention_combine"]


def test_text_is_golden(golden: object) -> None:
    from attnopt._version import VERSION

    spec = case("gqa").spec
    made = triton.emit_decode(spec, layout(spec, "bfloat16"), TritonPlan(16, 64, 4, 3))
    golden("triton_decode_gqa.py", made.source.replace(f"attnopt {VERSION}", "attnopt VERSION"))  # type: ignore[operator]
