"""Compilers that are missing, fail or hang."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime.compile import Compiler, Library, compile_shared, find_compiler, machine


def script(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\nif [ "$1" = "--version" ]; then echo fake 1.0; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_the_system_has_a_compiler_with_an_identity() -> None:
    compiler = find_compiler(Options())
    assert Path(compiler.command[0]).exists()
    assert len(compiler.identity) > 5


def test_a_missing_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match=r"'/no/such/cxx' is not an executable.*Install g\+\+"):
        find_compiler(Options(cxx="/no/such/cxx"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompileError, match="none of g"):
        find_compiler(Options())


def test_a_failing_compiler_shows_its_first_lines(tmp_path: Path) -> None:
    compiler = find_compiler(Options(cxx=script(tmp_path / "cxx", 'echo "kernel.cpp:1: no" >&2; exit 3')))
    with pytest.raises(CompileError, match=r"failed with 3.*kernel.cpp:1: no"):
        compile_shared(compiler, tmp_path / "x.cpp", tmp_path / "x.so", (), 10)


def test_a_silent_compiler_without_output_is_an_error(tmp_path: Path) -> None:
    compiler = find_compiler(Options(cxx=script(tmp_path / "cxx", "exit 0")))
    with pytest.raises(CompileError, match="wrote no library"):
        compile_shared(compiler, tmp_path / "x.cpp", tmp_path / "x.so", (), 10)


def test_a_hanging_compiler_is_ended_with_its_children(tmp_path: Path) -> None:
    compiler = find_compiler(Options(cxx=script(tmp_path / "cxx", "sleep 60 & sleep 60")))
    start = time.monotonic()
    with pytest.raises(CompileError, match="did not finish within 0.3 s"):
        compile_shared(compiler, tmp_path / "x.cpp", tmp_path / "x.so", (), 0.3)
    assert time.monotonic() - start < 10


def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"no library")
    with pytest.raises(CompileError, match="cannot be loaded"):
        Library(tmp_path / "x.so", "key")


@pytest.mark.parametrize(("abi", "key", "message"), [(99, "key", "has ABI 99"), (1, "other", "another spec")])
def test_a_library_of_another_abi_or_spec_is_an_error(tmp_path: Path, abi: int, key: str, message: str) -> None:
    source = tmp_path / "x.cpp"
    source.write_text(
        f'extern "C" int attnopt_abi() {{ return {abi}; }}\n'
        f'extern "C" const char* attnopt_key() {{ return "{key}"; }}\nextern "C" int attnopt_forward() {{ return 0; }}'
    )
    compile_shared(find_compiler(Options()), source, tmp_path / "x.so", ("-fPIC", "-shared"), 60)
    with pytest.raises(CompileError, match=message):
        Library(tmp_path / "x.so", "key")


def test_machine_is_stable() -> None:
    assert machine() == machine()
    assert isinstance(Compiler(("g++",), "x"), Compiler)
