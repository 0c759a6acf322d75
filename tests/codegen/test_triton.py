"""The text of Triton kernels: headed, readable, runnable alone, declined with a reason where there is none."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy as sp

from attnopt import expr as ex
from attnopt._version import VERSION
from attnopt.codegen import triton
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, EmptyRow, Heads
from tests.specs import CASES, case

PLAN = TritonPlan(64, 32, 4, 2)


def layout(spec: AttentionSpec, dtype: str = "float32") -> Layout:
    return Layout(dtype, tuple(CaptureLayout("float32" if c.kind == "float" else "int64", 1) for c in spec.captures))


def text(spec: AttentionSpec, dtype: str = "float32") -> str:
    return triton.emit(spec, layout(spec, dtype), PLAN, "model.py:12").source


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("scale", "bfloat16"),
        ("window", "float32"),
        ("empty_uniform", "bfloat16"),
        ("guarded", "float16"),
        ("sink", "float32"),
    ],
)
def test_text_is_golden(name: str, dtype: str, golden: Callable[[str, str], None]) -> None:
    golden(f"triton_{name}.py", text(case(name).spec, dtype).replace(f"attnopt {VERSION}", "attnopt VERSION"))


@pytest.mark.parametrize("item", CASES, ids=str)
def test_text_is_python_with_a_header(item: object) -> None:
    spec = item.spec  # type: ignore[attr-defined]
    made = text(spec)
    head = ast.get_docstring(ast.parse(made)) or ""
    for part in (VERSION, str(spec.canonical()), spec.key, str(PLAN), "model.py:12"):
        assert part in head, f"the header lacks {part}"
    assert max(map(len, made.splitlines())) <= 200


def test_text_is_a_function_of_its_inputs() -> None:
    spec = case("alibi").spec
    first, second = (triton.emit(spec, layout(spec), PLAN) for _ in range(2))
    assert first == second
    assert first.key != triton.emit(spec, layout(spec), replace(PLAN, block_n=64)).key
    assert first.key != triton.emit(spec, layout(spec, "float16"), PLAN).key


def test_no_name_of_a_capture_or_scalar_is_in_the_way() -> None:
    words = ("q", "tl", "lo", "for", "acc", "k0", "HEADS")
    for word in words:
        load = ex.load(word, ex.h, ex.k)
        spec = replace(
            case("line").spec, score=ex.s + load, captures=(replace(case("line").spec.captures[0], name=word),)
        )
        ast.parse(text(spec))
        ast.parse(text(replace(case("offset").spec, scalars=(word,), keep=ex.k <= ex.q + ex.scalar(word))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout": 0.5}, "no dropout"),
        ({"heads": Heads(2, 2, 2, 300, 64)}, "up to 256"),
        ({"merge": (case("plain").spec,)}, "one result"),
        ({"weight": ex.s, "empty_row": EmptyRow.UNIFORM}, "spread"),
        ({"score": ex.Mod(ex.s, 2)}, "remainder of floats"),
    ],
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_what_cannot_be_printed_is_declined(change: dict[str, object], reason: str) -> None:
    spec = replace(case("plain").spec, **change)
    assert reason in (triton.supported(spec, layout(spec)) or "")
    with pytest.raises(SpecError, match=reason):
        text(spec)


def test_dtypes_are_declined() -> None:
    spec = case("bias").spec
    assert "float64" in (triton.supported(spec, layout(spec, "float64")) or "")
    odd = Layout("float32", (CaptureLayout("complex64", 1),))
    assert "complex64" in (triton.supported(spec, odd) or "")
    assert "1" in (triton.supported(spec, Layout("float32")) or "")


def test_full_tiles_have_no_mask() -> None:
    """Whatever compares with a mask stands under MASKED."""
    tree = ast.parse(text(case("window").spec))
    visit = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "visit_keys")
    loop = next(n for n in visit.body if isinstance(n, ast.For))
    for node in loop.body:
        if not isinstance(node, ast.If):
            assert "where(((" not in ast.unparse(node)
            assert " >= " not in ast.unparse(node)
    assert any(isinstance(n, ast.If) and ast.unparse(n.test) == "MASKED" for n in loop.body)


def test_a_score_without_the_product_still_fills_a_tile() -> None:
    assert "tl.zeros_like(s) + " in text(replace(case("line").spec, score=ex.load("line", ex.h, ex.k)))
    assert "keep" in str(replace(case("plain").spec, keep=sp.Ge(ex.q, ex.k)))
