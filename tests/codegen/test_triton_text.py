"""Text that Triton kernels share: head maps, what a function has to be given."""

from __future__ import annotations

import pytest

from attnopt.codegen.triton_text import arguments, assigned, full, head_map, indent, words


@pytest.mark.parametrize(
    ("table", "count", "text"),
    [
        ((0, 1, 2, 3), 4, "h"),
        ((0, 0, 1, 1), 2, "h // 2"),
        ((0, 1, 0, 1), 2, "h % 2"),
        ((0, 0, 0), 1, "h // 3"),
        ((0, 2, 1, 1, 0), 3, "tl.where(h < 1, 0, tl.where(h < 2, 2, tl.where(h < 4, 1, 0)))"),
    ],
)
def test_head_maps(table: tuple[int, ...], count: int, text: str) -> None:
    assert head_map(table, count) == text


def test_a_function_is_given_what_it_uses() -> None:
    body = ["for k0 in range(lo, hi, BLOCK_N):", "    a, b = f(k0, x.stride)", "    c += a + y"]
    assert assigned(body) == ["k0", "a, b"] or assigned(body) == ["k0", "a", "b", "c"]
    assert "stride" not in words(body)
    assert arguments(body, ["y", "z", "x", "a", "y"], ["c"]) == ["c", "y", "x"]
    assert indent(["x", ""]) == ["    x", ""]


def test_a_number_for_each_row() -> None:
    assert full("0.0") == "tl.full([BLOCK_M, 1], 0.0, tl.float32)"
