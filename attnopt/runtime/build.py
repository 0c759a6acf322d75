"""From a spec to a loaded kernel: generated text, compiled once, kept in the cache."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from attnopt import dump
from attnopt._version import VERSION
from attnopt.codegen import cpp
from attnopt.codegen.base import ABI, Kernel, Layout, Plan
from attnopt.errors import CacheError, CompileError
from attnopt.options import Options
from attnopt.runtime.cache import Cache, entry_key
from attnopt.runtime.compile import Compiler, Library, compile_shared, find_compiler, machine
from attnopt.spec import AttentionSpec

Warn = Callable[[str], None]


def build(
    spec: AttentionSpec, layout: Layout, options: Options, warn: Warn, note: str = "", plan: Plan | None = None
) -> Library:
    """The loaded C++ kernel of a spec. Raises `CompileError` if it cannot be had, with what to do.

    A cache that cannot be trusted or written costs a warning, never the kernel.
    """
    kernel = cpp.emit(spec, layout, plan, source_note=note)
    dump.kernel(options.dump, f"{spec.key[:16]}_{kernel.key[:8]}.cpp", kernel.source)
    return build_kernel(kernel, options, warn, spec.text)


def build_kernel(kernel: Kernel, options: Options, warn: Warn, spec_text: str = "", entry: str = "forward") -> Library:
    """As `build`, from text that was generated (or edited) before. `entry`: `forward`, `backward` or `side`."""
    compiler = find_compiler(options)
    key = entry_key(kernel.key, compiler.identity, *cpp.FLAGS, str(ABI), VERSION, machine())
    cache = open_cache(options, warn)
    try:
        found = cache.get(key)
        if found is None:
            with cache.lock(key, options.lock_timeout):
                found = cache.get(key)
                if found is None:
                    return _compile(kernel, compiler, cache, key, options, warn, spec_text, entry)
        return Library(found, kernel.spec_key, entry)
    except CacheError as error:
        warn(f"{error} The kernel is compiled for this process alone.")
    except OSError as error:
        warn(f"the cache folder {cache.path} failed: {error}. The kernel is compiled for this process alone.")
    return _compile(kernel, compiler, None, key, options, warn, spec_text, entry)


def open_cache(options: Options, warn: Warn) -> Cache:
    """The cache that the options name; where it cannot be trusted, a warning and a private temporary one."""
    try:
        return Cache(options.cache_path)
    except CacheError as error:
        warn(f"{error} A temporary cache is used until then.")
        return Cache(_temporary())


@functools.lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="attnopt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(
    kernel: Kernel,
    compiler: Compiler,
    cache: Cache | None,
    key: str,
    options: Options,
    warn: Warn,
    spec_text: str,
    entry: str,
) -> Library:
    try:
        with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
            source, target = Path(folder, "kernel.cpp"), Path(folder, f"{key[:16]}.so")
            source.write_text(kernel.source)
            compile_shared(compiler, source, target, cpp.FLAGS, options.compile_timeout)
            if cache is not None:
                about: dict[str, object] = {
                    "spec": spec_text,
                    "spec_key": kernel.spec_key,
                    "compiler": compiler.identity,
                }
                about |= {"flags": [*cpp.FLAGS], "abi": ABI, "version": VERSION, "machine": machine()}
                try:
                    return Library(cache.put(key, kernel.source, target, about), kernel.spec_key, entry)
                except OSError as error:
                    warn(f"a kernel could not be stored in {cache.path}: {error}. It works until this process ends.")
            # The library stays mapped when its folder is gone.
            return Library(target, kernel.spec_key, entry)
    except OSError as error:
        raise CompileError(f"a kernel could not be written for compilation: {error}. Free some disk space.") from error
