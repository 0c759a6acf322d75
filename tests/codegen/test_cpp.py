"""Generated text: golden files, what is declined, and the C ABI's answers to bad arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest

from attnopt.codegen import cpp
from attnopt.codegen.base import ABI, CaptureLayout, Layout
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec
from tests.codegen.harness import compiled
from tests.specs import CASES, case

_ALL = {"bias": "float32", "pad": "bool", "doc": "int64", "line": "float32"}


def _layout(spec: AttentionSpec, dtype: str = "float32") -> Layout:
    return Layout(dtype, tuple(CaptureLayout(_ALL.get(c.name, "float32"), 1) for c in spec.captures))


@pytest.mark.parametrize("name", ["scale", "padding_causal", "line", "gqa", "empty_uniform"])
def test_text_is_golden(name: str, golden: Callable[[str, str], None]) -> None:
    spec = case(name).spec
    golden(f"cpp_{name}.cpp", cpp.emit(spec, _layout(spec), source_note="model.py:12").source)


@pytest.mark.parametrize("item", CASES, ids=str)
def test_text_is_the_same_twice_and_has_no_holes(item: object) -> None:
    spec = item.spec  # type: ignore[attr-defined]
    kernel = cpp.emit(spec, _layout(spec))
    assert kernel.source == cpp.emit(AttentionSpec.parse(spec.text), _layout(spec)).source
    assert "@" not in kernel.source
    assert spec.key in kernel.source


def test_declined_with_a_reason() -> None:
    spec = case("scale").spec
    assert "dropout" in str(cpp.supported(replace(spec, dropout=0.1), Layout("float32")))
    assert "float64" in str(cpp.supported(spec, Layout("float64")))
    padded = case("padding").spec
    assert "complex64" in str(cpp.supported(padded, Layout("float32", (CaptureLayout("complex64", 1),))))
    assert "captures" in str(cpp.supported(padded, Layout("float32")))
    assert cpp.supported(padded, _layout(padded)) is None
    assert "'float'" in str(cpp.supported(replace(spec, scalars=("float",)), Layout("float32")))
    with pytest.raises(SpecError, match="float64"):
        cpp.emit(spec, Layout("float64"))


def test_note_cannot_leave_its_comment() -> None:
    source = cpp.emit(case("scale").spec, Layout("float32"), source_note="a.py:1\nint x; \\").source
    assert not any(line.startswith("int x") for line in source.splitlines())


def test_library_names_itself_and_refuses_bad_arguments() -> None:
    spec = case("scale").spec
    kernel = cpp.emit(spec, Layout("float32"))
    library = compiled(kernel.source, kernel.key)
    library.attnopt_key.restype = ctypes.c_char_p
    assert library.attnopt_abi() == ABI
    assert library.attnopt_key().decode() == spec.key
    meta = (ctypes.c_int64 * 19)(-1, 1, 1)
    pointers = (ctypes.c_void_p * 3)()
    assert library.attnopt_forward(None, None, None, meta, 1) == 2
    assert library.attnopt_forward(pointers, None, None, meta, 1) == 2
    meta[0] = 1
    assert library.attnopt_forward(pointers, None, None, meta, 0) == 2
    assert library.attnopt_forward(pointers, None, None, meta, 1) == 2
