"""Generated Triton as modules: loaded once, from files of this process."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attnopt.codegen import triton
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import CompileError
from attnopt.runtime import triton_load
from attnopt.runtime.triton_load import load
from tests.codegen.test_triton import layout
from tests.specs import case

KERNEL = triton.emit(case("causal").spec, layout(case("causal").spec), TritonPlan(16, 16, 4, 2))


def test_a_text_is_loaded_once() -> None:
    module = load(KERNEL)
    assert module is load(KERNEL)
    assert callable(module.attention)
    assert module.OPTIONS == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert load(replace(KERNEL, source=KERNEL.source + "\nMARK = 1\n")).MARK == 1


def test_no_other_user_can_change_the_file() -> None:
    folder = Path(str(load(KERNEL).__file__)).parent
    assert not folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def test_a_missing_package_is_a_compile_error() -> None:
    broken = replace(KERNEL, source="import a_package_that_is_not_there\n")
    with pytest.raises(CompileError, match="no usable Triton"):
        load(broken)


def test_an_old_triton_is_said_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_load, "_version", {"triton": "3.2.0", "numpy": "2.0"}.__getitem__)
    with pytest.raises(CompileError, match=r"Triton 3\.2\.0 is too old: the kernels need 3\.6"):
        load(KERNEL)
    assert [triton_load.too_old(x) for x in ("", "3.6.0", "3.10.0+git", "4.0")] == [""] * 4


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.1", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.4.1", True), ("", "2.4.1", True)],
)
def test_an_interpreter_that_cannot_run_is_said_once(
    triton_version: str, numpy_version: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"triton": triton_version, "numpy": numpy_version}
    monkeypatch.setattr(triton_load, "_version", versions.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_load.interpreter_problem()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if works:
        assert not triton_load.interpreter_problem()
        return
    with pytest.raises(CompileError, match=r"that of Triton 3\.6\.0 .* NumPy 2\.4\.1 refuses"):
        load(KERNEL)
