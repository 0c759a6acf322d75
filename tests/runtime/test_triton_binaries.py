"""Folders of machine code: what was written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from attnopt.codegen import triton
from attnopt.codegen.triton_plans import CHIPS, TritonPlan
from attnopt.errors import CacheError
from attnopt.runtime.triton_binaries import MANIFEST, digest, read, write
from attnopt.runtime.triton_compile import Compiled, compile_entry
from attnopt.spec import AttentionSpec, Heads
from tests.codegen.test_triton import layout
from tests.specs import case, with_heads

SPEC = with_heads(case("causal"), Heads(4, 2, 2, 32, 32)).spec


@pytest.fixture(scope="module")
def made() -> tuple[str, AttentionSpec, triton.TritonKernel, Compiled]:
    kernel = triton.emit(SPEC, layout(SPEC, "bfloat16"), TritonPlan(64, 32, 4, 2))
    return "causal", SPEC, kernel, compile_entry(kernel, kernel.entries[0], CHIPS["sm_90"])


def test_what_is_written_is_read_and_restored(made: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    assert write(tmp_path, [made]) == 1
    (found,) = read(tmp_path)
    assert found.kernel == made[2]
    assert found.code == made[3].binary
    restored = found.restore()
    assert restored.metadata.shared == made[3].shared
    assert restored.kernel == made[3].binary
    row = json.loads((tmp_path / MANIFEST).read_text())["kernels"][0]
    assert (row["arch"], row["spec_key"], row["num_warps"]) == ("sm_90", SPEC.key, 4)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ({"attnopt": "0.0.0"}, "compiled by attnopt 0.0.0"),
        ({"triton": "1.0"}, "with Triton 1.0"),
        ({"format": 99}, "format 99"),
        ({"kernels": [{}]}, "malformed"),
        ({"kernels": 3}, "malformed"),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_refused(made: tuple, tmp_path: Path, what: dict, reason: str) -> None:  # type: ignore[type-arg]
    write(tmp_path, [made])
    path = tmp_path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **what}))
    with pytest.raises(CacheError, match=reason):
        read(tmp_path)


def _changed(folder: Path, **values: object) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["kernels"][0].update(values)
    manifest["digest"] = digest(manifest["kernels"])
    path.write_text(json.dumps(manifest))


def test_machine_code_that_was_altered_is_refused(made: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    write(tmp_path, [made])
    (binary,) = tmp_path.glob("*.cubin")
    binary.write_bytes(binary.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheError, match="altered"):
        read(tmp_path)


def test_what_is_said_of_machine_code_is_as_fixed_as_the_code(made: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    write(tmp_path, [made])
    path = tmp_path / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["kernels"][0]["metadata"]["num_warps"] *= 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"the manifest in .* was altered"):
        read(tmp_path)


def test_a_path_out_of_the_folder_or_another_text_is_refused(made: tuple, tmp_path: Path) -> None:  # type: ignore[type-arg]
    write(tmp_path, [made])
    _changed(tmp_path, text="0" * 64)
    with pytest.raises(CacheError, match="another text"):
        read(tmp_path)
    _changed(tmp_path, file="../x.cubin")
    with pytest.raises(CacheError, match="not a file of that folder"):
        read(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be read"):
        read(tmp_path / "nothing")
