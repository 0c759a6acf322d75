"""Generated Triton text as a module. Triton reads a function's source from its file, so the text has to be one."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

from attnopt.codegen.triton import TritonKernel
from attnopt.errors import CompileError


def load(kernel: TritonKernel) -> ModuleType:
    """The module of a kernel, loaded once for each text. Raises `CompileError` if there is no Triton."""
    return _load(kernel.key, kernel.source)


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
