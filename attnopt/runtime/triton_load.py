"""Generated Triton text as a module. Triton reads a function's source from its file, so the text has to be one."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

from attnopt.codegen.triton import TritonKernel
from attnopt.errors import CompileError

# The oldest Triton that the kernels are tested with.
_OLDEST = (3, 6)
# What switches Triton's interpreter on; the newest Triton whose interpreter fails with a NumPy from `_STRICT` on.
_ON = ("1", "true", "yes", "on", "y")
_FAILS, _STRICT = (3, 6), (2, 4)


def load(kernel: TritonKernel) -> ModuleType:
    """The module of a kernel, loaded once for each text. Raises `CompileError` if there is no Triton that runs it."""
    problem = too_old(_version("triton")) or interpreter_problem()
    if problem:
        raise CompileError(problem)
    return _load(kernel.key, kernel.source)


def too_old(version: str) -> str:
    """Why a Triton of this version is not used; empty if it may be, or if the version is unknown."""
    if not version or _numbers(version) >= _OLDEST:
        return ""
    return f"Triton {version} is too old: the kernels need {'.'.join(map(str, _OLDEST))}. Install attnopt[triton]"


def interpreting() -> bool:
    """Whether the environment asks for Triton's interpreter. Imports no Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in _ON


def interpreter_problem() -> str:
    """Why `TRITON_INTERPRET=1`, if it is set, cannot run anything here; empty if it can. Imports no Triton."""
    if not interpreting():
        return ""
    return _clash(_version("triton"), _version("numpy"))


def _clash(triton: str, numpy: str) -> str:
    if not triton or not numpy or _numbers(triton) > _FAILS or _numbers(numpy) < _STRICT:
        return ""
    return (
        f"a kernel was to run under Triton's interpreter (TRITON_INTERPRET=1), but that of Triton {triton} converts "
        f"arrays of one element to numbers, which NumPy {numpy} refuses. Install Triton 3.9, or NumPy below 2.4; "
        f"compiling, ahead of time too, works as it is."
    )


@functools.lru_cache(maxsize=8)
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])


@functools.lru_cache(maxsize=4096)
def _load(key: str, source: str) -> ModuleType:
    name = f"attnopt_triton_{key[:16]}"
    path = _folder() / f"{name}.py"
    # Written by this process alone, into a folder that no other user can enter: nothing read back is trusted.
    path.write_text(source, encoding="utf-8")
    about = importlib.util.spec_from_file_location(name, path)
    if about is None or about.loader is None:
        raise CompileError(f"a generated kernel at {path} could not be loaded.")
    module = importlib.util.module_from_spec(about)
    try:
        about.loader.exec_module(module)
    except ImportError as error:
        raise CompileError(f"there is no usable Triton here: {error}. Install attnopt[triton].") from error
    return module


@functools.lru_cache(maxsize=1)
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="attnopt-triton-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder
