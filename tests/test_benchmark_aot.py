"""The table of what the compiler says: joined from parts, and compiled again only where the text is another."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "aot.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    about = importlib.util.spec_from_file_location("benchmark_aot", SCRIPT)
    assert about is not None
    assert about.loader is not None
    module = importlib.util.module_from_spec(about)
    sys.modules["benchmark_aot"] = module
    about.loader.exec_module(module)
    return module


def made(spills: int | None = 0, shared: int = 1024, products: int = 8) -> Any:
    """What the compiler says of an entry, without compiling it."""

    def compile_entry(kernel: Any, entry: Any, chip: Any) -> Any:
        from attnopt.runtime.triton_compile import Compiled

        calls.append(entry.name)
        return Compiled(chip, entry.name, b"", {}, shared, 4, 100, spills, {"mma.sync": products, "cp.async": 3})

    calls: list[str] = []
    return compile_entry, calls


def test_parts_are_joined_and_nothing_is_compiled_twice(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_entry, calls = made()
    monkeypatch.setattr(script, "compile_entry", compile_entry)
    part = ["--out", str(tmp_path), "--only", "dense", "--arch", "sm_80"]
    assert script.main([*part, "--kind", "forward"]) == 0
    assert script.main([*part, "--kind", "decode"]) == 0
    assert calls == ["attention_forward", "attention_split", "attention_combine"]
    assert script.main([*part, "--kind", "decode", "--kind", "forward"]) == 0
    assert len(calls) == 3
    report = json.loads((tmp_path / "aot.json").read_text())
    assert [row["entry"] for row in report["rows"]] == calls
    page = (tmp_path / "aot.md").read_text()
    assert "| dense | forward | sm_80 | bfloat16 | 128 |" in page
    assert "8 mma.sync" in page
    assert "python benchmarks/aot.py" in page
    assert report["done"] == 2
    assert f"{report['left']} of {report['left'] + 2} files of kernels are not compiled yet" in page
    assert report["left"] > 200
    report["rows"][0]["text"] = "another"
    (tmp_path / "aot.json").write_text(json.dumps(report))
    assert script.main([*part, "--kind", "forward"]) == 0
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("about", "problem"),
    [({"spills": 1000}, "spills 1000"), ({"shared": 1 << 20}, "shared memory"), ({"products": 0}, "tensor core")],
    ids=["spills", "shared", "products"],
)
def test_a_kernel_with_a_problem_is_said(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, int], problem: str
) -> None:
    monkeypatch.setattr(script, "compile_entry", made(**about)[0])
    given = ["--out", str(tmp_path), "--only", "dense", "--arch", "sm_80", "--kind", "forward"]
    assert script.main(given) == 1
    assert problem in json.loads((tmp_path / "aot.json").read_text())["rows"][0]["problem"]


def test_every_plan_is_a_job(script: ModuleType) -> None:
    found = list(script.jobs(("sm_90",), ("forward",), True))
    plans = {(job.dtype, job.about["width"], job.plan) for job in found}
    assert len(plans) == len(found) > 10
    usual = list(script.jobs(("sm_90", "gfx942"), ("forward", "backward"), False))
    assert len({(job.name, job.kind, job.chip.name) for job in usual}) == len(usual) > 40
    linear = list(script.jobs(("sm_80",), ("linear",), False))
    assert [job.name for job in linear] == ["linear", "retention"]
