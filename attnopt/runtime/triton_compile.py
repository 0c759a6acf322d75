"""Generated Triton text as machine code, ahead of time and without a GPU."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from attnopt.codegen.triton import Entry, TritonKernel
from attnopt.codegen.triton_loads import TRITON_TYPES
from attnopt.codegen.triton_plans import Chip
from attnopt.errors import CompileError
from attnopt.runtime.triton_load import load

# What to look for in the assembly: products on tensor cores, and copies that do not wait.
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma", "cp.async", "cp.async.bulk")
# The product that each chip has for 16-bit elements.
PRODUCTS = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async",
            "sm_100": "tcgen05.mma", "sm_120": "mma.sync", "gfx942": "v_mfma"}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """Machine code of one entry for one chip. `registers` and `spills` (bytes, or registers on AMD) may be unknown."""

    chip: Chip
    entry: str
    binary: bytes
    about: Mapping[str, Any]
    shared: int
    warps: int
    registers: int | None
    spills: int | None
    instructions: Mapping[str, int]

    @property
    def problem(self) -> str | None:
        """Why it cannot run on the chip; None if it can."""
        if self.shared > self.chip.shared:
            return f"needs {self.shared} bytes of shared memory; {self.chip.name} has {self.chip.shared}"
        return None


def signature(entry: Entry) -> tuple[dict[str, str], dict[str, int], dict[tuple[int, ...], list[Any]]]:
    """Types, constants and divisibilities of an entry's arguments in the usual layout.

    That is: aligned tensors, rows of q, k, v and out without gaps, all their other strides multiples of 16.
    """
    types: dict[str, str] = {}
    constants: dict[str, int] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    divisible = [["tt.divisibility", 16]]
    for position, argument in enumerate(entry.arguments):
        if argument.kind == "stride" and argument.rows:
            if argument.last:
                types[argument.name], constants[argument.name] = "constexpr", 1
                continue
            attributes[position,] = divisible
        types[argument.name] = TRITON_TYPES.get(argument.kind, "i32")
        if argument.kind in TRITON_TYPES:
            attributes[position,] = divisible
    return types, constants, attributes


def source(kernel: TritonKernel, entry: Entry) -> Any:
    """The entry as Triton takes it. Raises `CompileError` without Triton."""
    try:
        from triton.compiler import ASTSource
    except ImportError as error:
        raise CompileError(f"there is no usable Triton here: {error}. Install attnopt[triton].") from error
    types, constants, attributes = signature(entry)
    return ASTSource(getattr(load(kernel), entry.name), types, constants, attributes)


def compile_entry(kernel: TritonKernel, entry: Entry, chip: Chip) -> Compiled:
    """Compile one entry for one chip. Raises `CompileError` with the compiler's words."""
    made_of = source(kernel, entry)
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(chip.backend, chip.arch, chip.warp)
    try:
        made = triton.compile(made_of, target=target, options=kernel.plan.options)
    except Exception as error:
        raise CompileError(f"Triton cannot compile {entry.name} for {chip.name}: {_last_line(error)}.") from error
    assembly = made.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
    binary = bytes(made.asm[chip.binary])
    registers, spills = _cuda_usage(binary) if chip.backend == "cuda" else _amd_usage(assembly)
    counts = {name: assembly.count(name) for name in INSTRUCTIONS if name in assembly}
    about = json.loads(json.dumps(made.metadata._asdict(), default=lambda x: getattr(x, "__dict__", str(x))))
    return Compiled(
        chip, entry.name, binary, about, int(made.metadata.shared), int(made.metadata.num_warps),
        registers, spills, counts,
    )  # fmt: skip


def triton_version() -> str:
    """The installed version, without importing it; empty if there is none."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _last_line(error: Exception) -> str:
    text = str(error).strip() or repr(error)
    return text.splitlines()[-1][:300].rstrip(".")


@functools.lru_cache(maxsize=1)
def _cuobjdump() -> Path | None:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.is_file() else None


def _cuda_usage(binary: bytes) -> tuple[int | None, int | None]:
    """Registers of a thread and bytes of its stack, which holds what was spilled."""
    tool = _cuobjdump()
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    return _number(r"REG:(\d+)", said), _number(r"STACK:(\d+)", said)


def _amd_usage(assembly: str) -> tuple[int | None, int | None]:
    """Vector registers of a lane and how many of them were spilled."""
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
