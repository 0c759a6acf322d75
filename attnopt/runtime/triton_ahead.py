"""Kernels of generated files as a folder has them, compiled ahead of time; what it lacks is compiled just in time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton import Entry, TritonKernel
from attnopt.codegen.triton_loads import TRITON_TYPES
from attnopt.codegen.triton_plans import Chip
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.runtime.triton_binaries import MANIFEST, Binary, read
from attnopt.runtime.triton_compile import signature
from attnopt.runtime.triton_load import interpreting, load

Warn = Callable[[str], None]
log = logging.getLogger("attnopt")

# Integers of a kernel are of 32 bits. Tensors begin, and rows of a tensor stand, at multiples of so many.
_INTEGER, _ALIGNED = 1 << 31, 16


class Ahead:
    """What the folder of `Options.aot_dir` holds for one chip; nothing where there is no such folder.

    `warn` hears, once each, that the folder cannot be used and that a kernel of it fails, with the reason.
    """

    def __init__(self, chip: Chip, options: Options | None, warn: Warn = log.warning) -> None:
        self.warn = warn
        self.binaries: dict[str, dict[str, Binary]] = {}
        self.modules: dict[str, ModuleType] = {}
        if options is None or not options.aot_dir or interpreting():
            return
        try:
            found = held(Path(options.aot_dir))
        except AttnoptError as error:
            warn(f"{str(error).rstrip('.')}. Kernels are compiled just in time instead.")
            return
        for binary in found:
            if binary.chip == chip:
                self.binaries.setdefault(binary.kernel.key, {})[binary.entry] = binary

    def holds(self, kernel: TritonKernel) -> bool:
        """Whether the folder has every entry of a file."""
        return self.binaries.get(kernel.key, {}).keys() >= {entry.name for entry in kernel.entries}

    def first(self, kernels: Sequence[TritonKernel]) -> list[TritonKernel]:
        """The same kernels, those of the folder first."""
        return sorted(kernels, key=lambda kernel: not self.holds(kernel))

    def module(self, kernel: TritonKernel) -> ModuleType:
        """The module of a kernel, whose launchers take what the folder has. Raises `CompileError` as `load`."""
        found = self.binaries.get(kernel.key)
        if not found:
            return load(kernel)
        if kernel.key not in self.modules:
            module, entries = load(kernel), {entry.name: entry for entry in kernel.entries}
            ready = {x: Ready(binary, entries[x], module, self.warn) for x, binary in found.items()}
            self.modules[kernel.key] = rebound(module, ready)
        return self.modules[kernel.key]


class Ready:
    """Stands where a kernel stands, `ready[grid](*arguments, **options)`, and launches what was compiled of it.

    Arguments that it was not compiled for (other dtypes, strides or alignments) and whatever fails to load or to
    launch go to the kernel that is compiled just in time; after a failure, every call does. `problem` says why.
    """

    def __init__(self, binary: Binary, entry: Entry, module: ModuleType, warn: Warn) -> None:
        self.binary, self.module, self.warn, self.problem = binary, module, warn, ""
        self.takes = _takes(entry)
        self.restored: dict[torch.device, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if not self.problem and self.fits(arguments):
            try:
                self._on(arguments)[grid](*arguments)
                return
            except Exception as error:  # another driver, or another chip, than it was made for
                self.problem = (str(error).strip().splitlines() or [repr(error)])[-1][:300].rstrip(".")
                about = f"{self.binary.entry} ({self.binary.kernel.kind}, {self.binary.chip.name})"
                self.warn(
                    f"{about} is compiled just in time, as what was compiled ahead of time failed: {self.problem}."
                )
        getattr(self.module, self.binary.entry)[grid](*arguments, **options)

    def _on(self, arguments: Sequence[Any]) -> Any:
        """The loaded machine code; a driver loads it for one device."""
        device = next((a.device for a in arguments if isinstance(a, Tensor)), torch.device("cpu"))
        if device not in self.restored:
            self.restored[device] = self.binary.restore()
        return self.restored[device]

    def fits(self, arguments: Sequence[Any]) -> bool:
        """Whether these arguments are of the types and have the constants and divisors that it was compiled with."""
        if len(arguments) != len(self.takes):
            return False
        for value, (dtype, constant, divisible) in zip(arguments, self.takes, strict=True):
            if dtype is not None:
                if not isinstance(value, Tensor) or value.dtype != dtype or value.data_ptr() % _ALIGNED:
                    return False
            elif constant is not None:
                if value != constant:
                    return False
            elif not -_INTEGER <= value < _INTEGER or (divisible and value % _ALIGNED):
                return False
        return True


def _takes(entry: Entry) -> list[tuple[torch.dtype | None, int | None, bool]]:
    """Of each argument: the dtype that it points to, or the number that it is, or whether it is a multiple of 16."""
    _, constants, attributes = signature(entry)
    return [
        (
            getattr(torch, argument.kind) if argument.kind in TRITON_TYPES else None,
            constants.get(argument.name),
            (place,) in attributes,
        )
        for place, argument in enumerate(entry.arguments)
    ]


def rebound(module: ModuleType, ready: Mapping[str, Any]) -> ModuleType:
    """A copy of a generated module whose launchers find what is `ready` where its kernels were.

    The kernels themselves stay as they are, in the module that was given.
    """
    made = ModuleType(module.__name__, module.__doc__)
    names = vars(made)
    names.update(vars(module))
    names.update(ready)
    if "KERNELS" in names:  # the launchers of linear attention find theirs by name
        names["KERNELS"] = {**names["KERNELS"], **ready}
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__globals__ is vars(module):
            given = value.__defaults__ or ()
            defaults = tuple(ready.get(getattr(x, "__name__", ""), x) for x in given)
            names[name] = FunctionType(value.__code__, names, name, defaults, value.__closure__)
    return made


def held(folder: Path) -> tuple[Binary, ...]:
    """The kernels of a folder, read and checked once for each manifest. Raises `CacheError` as `read`."""
    try:
        about = (folder / MANIFEST).stat()
    except OSError:
        return tuple(read(folder))
    return _held(folder, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=16)
def _held(folder: Path, modified: int, size: int) -> tuple[Binary, ...]:
    return tuple(read(folder))
