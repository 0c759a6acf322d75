"""Ranges become loops over tiles, each of them only where it can be."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton_parts import parts
from attnopt.codegen.triton_visits import loops, split_ranges, visit_calls, visit_function, wrapped
from tests.codegen.test_triton import layout
from tests.specs import case


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("plain", [("full_first", "full_last", False), ("full_last", "end", True)]),
        ("dilated", [("begin", "end", True)]),
        ("window", [("begin", "full_first", True), ("full_first", "full_last", False), ("full_last", "end", True)]),
    ],
)
def test_loops_are_those_that_can_exist(name: str, found: list[tuple[str, str, bool]]) -> None:
    spec = case(name).spec.canonical()
    made = parts(spec, layout(spec))
    assert loops(made, "begin", "end") == found
    text = "\n".join(split_ranges(made))
    assert ("full_last = " in text) == (len(found) > 1)


def test_a_function_is_called_with_what_it_takes() -> None:
    function = visit_function("visit_keys", ["acc"], ["acc", "n_k"], ["acc += n_k"])
    assert "acc,\n    n_k,\n    lo, hi, MASKED: tl.constexpr," in function
    assert function.endswith("    return acc")
    assert visit_calls([("0", "n_k", True)], ["acc"], ["acc", "n_k"], "visit_new") == [
        "acc = visit_new(", "    acc,", "    n_k,", "    0, n_k, True,", ")",
    ]  # fmt: skip


def test_long_lists_of_arguments_are_wrapped() -> None:
    assert wrapped([]) == []
    assert wrapped(["a", "b"]) == ["a, b,"]
    lines = wrapped([f"name_{i}" for i in range(40)])
    assert max(map(len, lines)) <= 100
    assert " ".join(lines).count(",") == 40
