"""The system's C++ compiler: found, identified, run with a time limit; and the loader of what it made."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  loaded first, so that a kernel binds to the OpenMP runtime that torch brought

from attnopt.codegen.base import ABI
from attnopt.errors import CompileError
from attnopt.options import Options

_CANDIDATES = ("g++", "clang++", "c++")
_INSTALL = "Install g++ or clang++ (Debian, Ubuntu: `apt-get install g++`), or set Options(cxx=...) or $CXX."
_IDENTIFY_SECONDS = 10.0


@dataclass(frozen=True)
class Compiler:
    """A compiler's command, with arguments if it was given any, and what it says that it is."""

    command: tuple[str, ...]
    identity: str


def find_compiler(options: Options) -> Compiler:
    """The compiler to use: `options.cxx`, then `$CXX`, `g++`, `clang++`, `c++`. Raises `CompileError` if none runs."""
    asked = options.cxx or os.environ.get("CXX") or ""
    return _find(asked, os.environ.get("PATH", ""))


@functools.lru_cache(maxsize=16)
def _find(asked: str, path: str) -> Compiler:
    candidates = [tuple(shlex.split(asked))] if asked else [(name,) for name in _CANDIDATES]
    for command in candidates:
        found = shutil.which(command[0], path=path) if command else None
        if found:
            real = (found, *command[1:])
            return Compiler(real, _identify(real))
    looked = f"{asked!r} is not an executable" if asked else f"none of {', '.join(_CANDIDATES)} is on the path"
    raise CompileError(f"no C++ compiler was found: {looked}. {_INSTALL}")


def _identify(command: tuple[str, ...]) -> str:
    code, out, err = _run([*command, "--version"], _IDENTIFY_SECONDS)
    if code != 0:
        raise CompileError(f"`{shlex.join(command)} --version` failed with {code}: {_head(err)} {_INSTALL}")
    return f"{Path(command[0]).resolve()} {shlex.join(command[1:])} {out.splitlines()[0] if out else '?'}"


def compile_shared(compiler: Compiler, source: Path, target: Path, flags: Sequence[str], timeout: float) -> None:
    """Compile `source` to the shared library `target`. Raises `CompileError` on failure or after `timeout` seconds."""
    command = [*compiler.command, *flags, str(source), "-o", str(target)]
    code, _, err = _run(command, timeout)
    if code != 0:
        raise CompileError(f"{compiler.command[0]} failed with {code} on a generated kernel: {_head(err)} {_INSTALL}")
    if not target.exists():
        raise CompileError(f"{compiler.command[0]} reported success but wrote no library. {_INSTALL}")


def _run(command: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. The whole process group ends with the time limit: g++ has children."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise CompileError(f"{command[0]} could not be started: {error}. {_INSTALL}") from error
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompileError(
                    f"{command[0]} did not finish within {timeout:g} s and was ended; raise "
                    f"Options(compile_timeout=...) if it is only slow, else check the compiler."
                ) from None
            raise
    return process.returncode, out, err


def _head(text: str, lines: int = 5) -> str:
    kept = [line for line in text.strip().splitlines() if line.strip()][:lines]
    return "\n".join(kept)[:2000] or "it said nothing."


@functools.lru_cache(maxsize=1)
def machine() -> str:
    """The architecture and its instruction sets: code made with `-march=native` may run nowhere else."""
    features = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        features = next((line for line in info if line.startswith(("flags", "Features"))), features)
    return f"{platform.system()} {platform.machine()} {hashlib.sha256(features.encode()).hexdigest()[:16]}"


@functools.lru_cache(maxsize=1)
def vector_lanes() -> int:
    """Floats in a vector of this processor, as code made with `-march=native` uses them: 4, 8 or 16."""
    text = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        text = next((line for line in info if line.startswith("flags")), "")
    flags = set(text.split())
    return 16 if "avx512f" in flags else 8 if {"avx2", "fma"} <= flags else 4


_ARGUMENTS = {
    "forward": (*[ctypes.c_void_p] * 4, ctypes.c_int32),
    "backward": (*[ctypes.c_void_p] * 2, ctypes.c_int32),
    "side": (*[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_int32),
}


class Library:
    """A loaded kernel: `run` is its entry point, `path` the file it came from."""

    def __init__(self, path: Path, spec_key: str, entry: str = "forward") -> None:
        self.path = path
        try:
            self.handle = ctypes.CDLL(str(path))
            abi, key, run = (getattr(self.handle, f"attnopt_{name}") for name in ("abi", "key", entry))
        except (OSError, AttributeError) as error:
            raise CompileError(f"the compiled kernel {path.name} cannot be loaded: {error}.") from error
        abi.restype, key.restype = ctypes.c_int32, ctypes.c_char_p
        if abi() != ABI:
            raise CompileError(f"the compiled kernel {path.name} has ABI {abi()}; this attnopt speaks {ABI}.")
        if key() != spec_key.encode():
            raise CompileError(f"the compiled kernel {path.name} computes another spec than the one asked for.")
        run.restype = ctypes.c_int32
        run.argtypes = _ARGUMENTS[entry]
        self.run = run
