"""Kernels from the cache, by many processes, and on a disk that is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnopt.codegen.base import Layout
from attnopt.options import Options
from attnopt.runtime.build import build
from attnopt.runtime.cache import Cache
from tests.runtime.cases import CAUSAL, PLAIN

LAYOUT = Layout("float32")
WORKER = """
import sys
from attnopt.codegen.base import Layout
from attnopt.options import Options
from attnopt.runtime.build import build
from tests.runtime.cases import PLAIN
print(build(PLAIN, Layout("float32"), Options(cache_dir=sys.argv[1]), lambda text: sys.exit(text)).path.name)
"""


def test_the_second_build_loads_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(cache_dir=str(tmp_path / "cache"))
    first = build(PLAIN, LAYOUT, options, pytest.fail)
    monkeypatch.setattr("attnopt.runtime.build.compile_shared", lambda *args: pytest.fail("compiled again"))
    assert build(PLAIN, LAYOUT, options, pytest.fail).path == first.path


def test_an_altered_library_is_built_anew(tmp_path: Path) -> None:
    options = Options(cache_dir=str(tmp_path / "cache"))
    path = build(PLAIN, LAYOUT, options, pytest.fail).path
    good = path.read_bytes()
    path.unlink()
    path.write_bytes(good[: len(good) // 2])
    assert build(PLAIN, LAYOUT, options, pytest.fail).path == path
    assert set(Cache(tmp_path / "cache").verify().values()) == {None}


def test_many_processes_make_one_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {worker.communicate(timeout=100)[0].strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(names) == 1
    assert len(Cache(tmp_path / "cache").entries()) == 1


def test_a_full_disk_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said: list[str] = []
    library = build(CAUSAL, LAYOUT, Options(cache_dir=str(tmp_path / "cache")), said.append)
    assert library.run is not None
    assert len(said) == 1
    assert "No space left on device" in said[0]
