"""The table of quality: one line a rewrite, from a subject to Markdown, and nothing lost between runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from attnopt.errors import AttnoptError
from attnopt.rewrites import PruneHeads, ShareKV
from benchmarks import quality
from benchmarks.quality import Figures, Row
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
    asked = argparse.Namespace(out=tmp_path, threads=1, steps=5, no_picture=True)
    times = {"5": 2.0}
    first = Figures("a", "none", "exact", 0, 1.5, None, 10, 8, times, times)
    less = Figures("a", "ShareKV", "half", 1, 1.75, 1.6, 7, 4, {"5": 1.0}, times, "a note")
    quality.write(asked, "a", "The first", [first, less], {"Linearize (elu)": "no gain"})
    quality.write(asked, "b", "The second", [first], {})
    assert set(json.loads((tmp_path / "quality.json").read_text())) == {"a", "b"}
    text = (tmp_path / "quality.md").read_text()
    assert "## The first" in text
    assert "## The second" in text
    assert "| ShareKV | half | 1.7500 | 1.6000 | 7 | 4 | 1 (0.50) |" in text
    assert "- ShareKV (half): a note" in text
    assert "- Linearize (elu): left out, no gain" in text
