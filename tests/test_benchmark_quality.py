"""The table of quality: one line a rewrite, from a subject to Markdown, and nothing lost between runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from attnopt.errors import AttnoptError
from attnopt.rewrites import PruneHeads, ShareKV
from benchmarks import quality, quality_bias, quality_text
from benchmarks.quality import Row
from benchmarks.quality_text import BiasFigures, Figures
from benchmarks.subjects import Subject
from tests.passes.tiny import model


def _subject() -> Subject:
    module, x = model("separate")

    def closeness(one: torch.nn.Module) -> float:
        with torch.no_grad():
            return torch.cosine_similarity(one(x=x), module(x=x), -1).mean().item()

    data = [{"x": torch.randn_like(x)} for _ in range(2)]
    return Subject(
        "toy", "a toy", module, {"x": x}, None, data, data, closeness, "higher", lambda n: {"x": x}, (5,), "mse", 1e-2
    )


def test_a_line_has_quality_before_and_after_and_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_BASELINES", {})
    at = _subject()
    line = quality.measure(Row("ShareKV", "2 of 4", {"method": "mean"}, (2,)), at, steps=20, repeats=2)
    assert isinstance(line, Figures), line
    assert line.quality is not None
    assert line.healed is not None
    assert line.quality < line.healed < 1
    assert line.parameters == sum(p.numel() for p in at.model.parameters()) - 4 * 6 * 25
    assert line.kv_bytes == 4 * 2 * 12
    assert line.ms.keys() == line.original_ms.keys() == {"5"}
    assert min(*line.ms.values(), *line.original_ms.values()) > 0


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_BASELINES", {})
    at = _subject()
    assert quality.measure(Row("Unknown", "", {}), at, 1, 2) == "not in this version"
    assert "does not divide" in str(quality.measure(Row("ShareKV", "", {"method": "mean"}, (3,)), at, 1, 2))
    assert "already" in str(quality.measure(Row("ShareKV", "", {"method": "mean"}, (4,)), at, 1, 2))


def test_every_row_can_be_made() -> None:
    made = [row.make() for row in quality.ROWS]
    assert {type(x) for x in made} >= {ShareKV, PruneHeads}
    with pytest.raises(AttnoptError):
        Row("ShareKV", "", {"method": "other"}, (4,)).make()


def test_subjects_measured_before_stay_in_the_table(tmp_path: Path) -> None:
    times = {"5": 2.0}
    first = Figures("a", "none", "exact", 0, 1.5, None, 10, 8, times, times)
    less = Figures("a", "ShareKV", "half", 1, 1.75, 1.6, 7, 4, {"5": 1.0}, times, "a note")
    slow = Figures("a", "Sparsify", "some", 1, 1.75, None, 7, 4, {"5": 3.0}, times)
    about = {"torch": "2", "threads": 1, "steps": 5}
    left = {"Linearize (elu)": "no gain"}
    rows = [vars(first), vars(less), vars(slow)]
    quality_text.write(tmp_path, {"a": {"about": {**about, "title": "The first"}, "rows": rows, "left out": left}})
    quality_text.write(
        tmp_path, {"b": {"about": {**about, "title": "The second"}, "rows": [vars(first)], "left out": {}}}
    )
    bias = BiasFigures("Some", "rank 2", 1, "8 to 10", 1e-3, 10, 20, 3.0, 2.0, "of its size")
    quality_text.write(tmp_path, {"bias": {"about": about, "rows": [vars(bias)]}})
    assert set(json.loads((tmp_path / "quality.json").read_text())) == {"a", "b", "bias"}
    text = (tmp_path / "quality.md").read_text()
    assert "## The first" in text
    assert "## The second" in text
    assert "| ShareKV | half | 1.7500 | 1.6000 | 7 | 4 | 1 (0.50) |" in text
    assert "- ShareKV (half): a note" in text
    assert "- Linearize (elu): left out, no gain" in text
    assert "- no faster than the exact model at 5 tokens: Sparsify (some, 1.50)" in text
    assert "| Some | rank 2 | 8 to 10 | 1.0e-03 | 10 (20) | 3 (1.50) | of its size |" in text
    assert "- no faster than the exact model: Some (rank 2, 1.50)" in text


def test_a_second_run_takes_up_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = _subject()
    rows = tuple(Row("ShareKV", f"{n} of 4", {"method": "mean"}, (n,), ("toy",)) for n in (2, 1))
    measured: list[str] = []

    def made(row: Row, *_: object) -> Figures:
        measured.append(row.strength)
        return Figures("toy", row.rewrite, row.strength, 1, 1.0, 1.0, 1, 1, {"5": 1.0}, {"5": 1.0}, "", row.code(at, 3))

    monkeypatch.setattr(quality, "ROWS", rows)
    monkeypatch.setattr(quality, "_BASELINES", {})
    monkeypatch.setattr(quality, "measure", made)
    asked = argparse.Namespace(out=tmp_path, threads=1, steps=3, repeats=2, only="", again=False)
    quality.subject(at, asked)
    quality.subject(at, asked)
    assert measured == ["2 of 4", "1 of 4"]
    held = json.loads((tmp_path / "quality.json").read_text())
    held["toy"]["rows"] = held["toy"]["rows"][::2]
    (tmp_path / "quality.json").write_text(json.dumps(held))
    quality.subject(at, asked)
    assert measured[2:] == ["2 of 4"], "what is missing is measured, and no more"
    found = json.loads((tmp_path / "quality.json").read_text())["toy"]["rows"]
    assert [x["strength"] for x in found] == ["exact", "2 of 4", "1 of 4"]
    quality.subject(at, argparse.Namespace(**{**vars(asked), "steps": 4}))
    assert measured[3:] == ["2 of 4", "1 of 4"], "another budget is another line"


def test_every_bias_row_can_be_made() -> None:
    from attnopt.rewrites import FactorBias

    assert all(FactorBias(**row.arguments).when == "pays" for row in quality_bias.ROWS)
    model, args, _ = quality_bias.smooth()
    with torch.no_grad():
        assert model(*args).shape == (1, 1024, 512)
