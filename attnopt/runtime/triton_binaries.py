"""Folders of machine code that was compiled ahead of time: a manifest, and one file for each kernel."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt._version import VERSION
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_kinds import EMIT
from attnopt.codegen.triton_plans import CHIPS, Chip, TritonPlan
from attnopt.errors import CacheError
from attnopt.runtime.triton_compile import Compiled, source, triton_version
from attnopt.spec import AttentionSpec

MANIFEST = "manifest.json"
FORMAT = 2


@dataclass(frozen=True)
class Binary:
    """One kernel of a folder: what it was made from, and its verified machine code."""

    kernel: TritonKernel
    chip: Chip
    entry: str
    code: bytes
    about: Mapping[str, Any]

    def restore(self) -> Any:
        """As Triton's compiled kernel: `restored[grid](*arguments)` launches it. Touches no driver before that."""
        from triton.compiler import CompiledKernel

        entry = next(e for e in self.kernel.entries if e.name == self.entry)
        with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
            files = [f"{entry.name}.json", f"{entry.name}.{self.chip.binary}"]
            names = {name: Path(folder, name) for name in files}
            names[f"{entry.name}.json"].write_text(json.dumps(dict(self.about)))
            names[f"{entry.name}.{self.chip.binary}"].write_bytes(self.code)
            # Everything is read here; the folder is not needed afterwards.
            return CompiledKernel(source(self.kernel, entry), names, self.kernel.key)


def write(folder: Path, made: Iterable[tuple[str, AttentionSpec, TritonKernel, Compiled]]) -> int:
    """Write the kernels and the manifest, which comes last; returns how many. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, spec, kernel, compiled in made:
        part = compiled.entry.removeprefix("attention_")
        stem = f"{name}_{part}_{kernel.layout.dtype}_{compiled.chip.name}_{kernel.key[:8]}"
        (folder / f"{stem}.{compiled.chip.binary}").write_bytes(compiled.binary)
        (folder / f"{stem}.py").write_text(kernel.source, encoding="utf-8")
        rows.append(_row(name, stem, spec, kernel, compiled))
    manifest: dict[str, Any] = {"format": FORMAT, "attnopt": VERSION, "triton": triton_version(), "kernels": rows}
    manifest["digest"] = digest(rows)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return len(rows)


def digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of what a manifest says of its kernels: how many warps they take is as decisive as their code."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _row(name: str, stem: str, spec: AttentionSpec, kernel: TritonKernel, made: Compiled) -> dict[str, Any]:
    return {
        "name": name,
        "arch": made.chip.name,
        "kind": kernel.kind,
        "file": f"{stem}.{made.chip.binary}",
        "sha256": hashlib.sha256(made.binary).hexdigest(),
        "spec": spec.text,
        "spec_key": spec.key,
        "layout": asdict(kernel.layout),
        "plan": asdict(kernel.plan),
        "text": kernel.key,
        "entry": made.entry,
        "shared": made.shared,
        "num_warps": made.warps,
        "registers": made.registers,
        "spills": made.spills,
        "instructions": dict(made.instructions),
        "metadata": dict(made.about),
    }


def read(folder: Path) -> list[Binary]:
    """The kernels of a folder. Raises `CacheError` for anything that is not as its manifest says.

    Only machine code is taken from the folder. The text is generated again, and has to be the same.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CacheError(f"the manifest in {folder} is of format {manifest['format']}, not {FORMAT}.")
        if manifest["attnopt"] != VERSION or manifest["triton"] != triton_version():
            raise CacheError(
                f"the kernels in {folder} were compiled by attnopt {manifest['attnopt']} with Triton "
                f"{manifest['triton']}; here are {VERSION} and {triton_version() or 'none'}. "
                f"Compile them again: attnopt aot."
            )
        found = [_binary(folder, row) for row in manifest["kernels"]]
        if digest(manifest["kernels"]) != manifest["digest"]:
            raise CacheError(f"the manifest in {folder} was altered. Compile its kernels again: attnopt aot.")
        return found
    except OSError as error:
        raise CacheError(f"the kernels in {folder} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the manifest in {folder} is malformed: {type(error).__name__}: {error}.") from error


def _binary(folder: Path, row: Mapping[str, Any]) -> Binary:
    name = str(row["file"])
    if Path(name).name != name:
        raise CacheError(f"the manifest in {folder} names {name!r}, which is not a file of that folder.")
    code = (folder / name).read_bytes()
    if hashlib.sha256(code).hexdigest() != row["sha256"]:
        raise CacheError(f"{name} in {folder} was altered or truncated. Compile it again: attnopt aot.")
    spec = AttentionSpec.parse(row["spec"])
    about = row["layout"]
    layout = Layout(
        about["dtype"],
        tuple(CaptureLayout(**c) for c in about["captures"]),
        int(about.get("page", 0)),
        bool(about.get("new")),
    )
    kernel = EMIT[row["kind"]](spec, layout, TritonPlan(**row["plan"]))
    if kernel.key != row["text"]:
        raise CacheError(f"{name} in {folder} was made from another text than this attnopt generates.")
    return Binary(kernel, CHIPS[row["arch"]], str(row["entry"]), code, row["metadata"])
