"""Dumps: files in the order of the steps, nothing overwritten, nothing written while it is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

import attnopt
from attnopt import dump
from attnopt.errors import OptionError
from attnopt.rewrites import PruneHeads
from tests.modules import Function, SelfAttention


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with dump.to(None):
        assert not dump.active()
        dump.step("a", {".txt": "x"})
    dump.kernel(None, "a.cpp", "x")
    assert _names(tmp_path) == []


def test_steps_are_numbered_and_continued(tmp_path: Path) -> None:
    for _ in range(2):
        with dump.to(str(tmp_path)):
            dump.step("first", {"_graph.py": "a", "_sites.txt": "b"})
            with dump.to(None):
                assert dump.active(), "an inner dump that is off changes nothing"
            dump.graph("second", fx.symbolic_trace(torch.nn.ReLU()))
    assert _names(tmp_path) == [
        "00_first_graph.py", "00_first_sites.txt", "01_second_graph.py",
        "02_first_graph.py", "02_first_sites.txt", "03_second_graph.py",
    ]  # fmt: skip
    assert not dump.active()


def test_every_step_of_an_optimisation_is_there(tmp_path: Path) -> None:
    model, x = SelfAttention().eval(), torch.randn(2, 5, 16)
    rewrites = [PruneHeads(heads={0: [1]})]
    attnopt.optimize(model, (x,), rewrites=rewrites, tolerance=10.0, options={"dump": str(tmp_path), "kernel": "cpp"})
    assert _names(tmp_path) == [
        "00_captured_graph.py", "01_functional_graph.py", "02_prune_heads_decision.txt", "02_prune_heads_graph.py",
        "03_found_graph.py", "03_found_sites.txt", "03_found_specs.txt",
        "04_lowered_graph.py", "04_lowered_sites.txt", "04_lowered_specs.txt", "05_report.json", "05_report.txt",
    ]  # fmt: skip
    (kernel,) = (tmp_path / "kernels").iterdir()
    key, text = (tmp_path / "03_found_specs.txt").read_text().split(maxsplit=1)
    assert kernel.name.startswith(key[:16])
    assert attnopt.AttentionSpec.parse(text.strip()).heads.q == 3
    assert "attnopt.attention" in (tmp_path / "04_lowered_graph.py").read_text()
    assert "1 rewritten" in (tmp_path / "05_report.txt").read_text()


def test_explain_and_the_backend_dump_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(2, 5, 8)
    monkeypatch.setenv("ATTNOPT_DUMP", str(tmp_path / "explain"))
    attnopt.explain(Function(run), (x,))
    assert "00_captured_graph.py" in _names(tmp_path / "explain")
    monkeypatch.delenv("ATTNOPT_DUMP")
    torch._dynamo.reset()
    options = {"rest": "eager", "dump": str(tmp_path / "compiled")}
    torch.compile(Function(run), backend="attnopt", options=options)(x)
    assert "score s" in (tmp_path / "compiled" / "03_lowered_sites.txt").read_text()


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("ATTNOPT_DUMP", str(file / "inside"))
    with pytest.raises(OptionError, match="ATTNOPT_DUMP"):
        attnopt.explain(Function(lambda x: x.relu()), (torch.ones(2),))
