"""`Report`: its text against a golden file, JSON there and back, HTML that escapes."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from attnopt import expr as ex
from attnopt.errors import AttnoptError, Decline
from attnopt.report import Figures, Report, Site, show_figure
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads

GOLDEN = Path(__file__).parent / "golden" / "report" / "report.txt"
CAUSAL = AttentionSpec(Heads(8, 2, 2, 64, 64), score=ex.s / 8, keep=ex.canon(ex.q >= ex.k))
BIASED = AttentionSpec(
    Heads(4, 4, 4, 32, 32),
    score=ex.s + ex.load("bias", ex.h, ex.q, ex.k),
    empty_row=EmptyRow.UNIFORM,
    captures=(Capture("bias", "float", (4, None, None)),),
)


def _site(name: str, **fields: object) -> Site:
    given = {"module_path": f"layers.{name}.attn", "source": "model.py:12", "pattern": "softmax", "kernel": "cpp"}
    return Site(name, **{**given, **fields})  # type: ignore[arg-type]


@pytest.fixture
def report() -> Report:
    error = {"max": 2.5e-7, "rms": 1e-8, "eager_max": 3.5e-7, "eager_rms": 1.5e-8}
    sites = (
        *(_site(str(i), spec=CAUSAL, error={**error, "max": 1e-7 * i}) for i in range(4)),
        _site("4", spec=CAUSAL, status="rewritten", rewrites=("bias_algebra", "prune_heads"), source="model.py:40"),
        _site("5", spec=BIASED, kernel="reference"),
        _site("6", status="declined", kernel="", reason=str(Decline("the weights are sorted", "sort_1"))),
        Site("softmax_9", status="declined", spec=BIASED),
    )
    figures = {
        "validation": {"output change, relative": 1.25e-7, "same shape": True},
        "prune_heads": {"before": {"parameters": 4096, "loss": 1.5}, "after": {"parameters": 3072, "loss": 1.53125}},
    }
    return Report(sites, "Toy", ("No compiler was found; 1 site runs the reference.",), figures)  # type: ignore[arg-type]


def test_text_is_the_golden_text(report: Report, request: pytest.FixtureRequest) -> None:
    text = str(report) + "\n"
    if request.config.getoption("--update-golden", default=False):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_counts_add_up(report: Report) -> None:
    assert (report.fused, report.rewritten, report.declined) == (5, 1, 2)
    assert report.fused + report.rewritten + report.declined == len(report.sites)


def test_equal_specs_are_one_line(report: Report) -> None:
    assert report.specs == (CAUSAL, BIASED)
    assert [len(group) for group in report.groups()] == [4, 1, 1]
    assert f"4 × {CAUSAL}" in str(report)


def test_the_worst_error_of_a_group_is_shown() -> None:
    sites = tuple(_site(str(i), spec=CAUSAL, error={"max": e}) for i, e in enumerate((1.0, float("nan"), 2.0)))
    assert "worst error: max nan" in str(Report(sites))


def test_every_decline_shows_reason_node_and_line(report: Report) -> None:
    text = str(report)
    assert "layers.6.attn: the weights are sorted (at %sort_1)" in text
    assert "model.py:12; nearest pattern softmax" in text
    assert "softmax_9: no reason was recorded" in text


def test_json_comes_back_the_same(report: Report) -> None:
    text = report.to_json()
    assert json.loads(text)["counts"] == {"sites": 8, "fused": 5, "rewritten": 1, "declined": 2}
    assert Report.from_json(text).to_json() == text
    assert str(Report.from_json(text)) == str(report)


def test_json_holds_what_json_has_no_number_for() -> None:
    report = Report(figures={"g": {"nan": float("nan"), "inf": float("-inf")}})  # type: ignore[arg-type]
    back = Report.from_json(report.to_json()).figures["g"]
    assert back["nan"] != back["nan"]
    assert back["inf"] == float("-inf")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "sites": [{}]}', "null"])
def test_other_text_is_an_attnopt_error(text: str) -> None:
    with pytest.raises(AttnoptError, match="report text"):
        Report.from_json(text)


def test_html_is_one_page_that_escapes(report: Report, tmp_path: Path) -> None:
    hostile = dataclasses.replace(report, model="<script>alert(1)</script>", notes=("a < b & c",))
    page = hostile.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "a &lt; b &amp; c" in page
    assert "http" not in page.replace("http-equiv", ""), "the page refers to nothing outside"
    for site in report.sites:
        assert site.name in page
    assert "the weights are sorted" in page


def test_html_of_an_empty_report(tmp_path: Path) -> None:
    page = Report().to_html(tmp_path / "empty.html").read_text(encoding="utf-8")
    assert "<b>0</b>sites" in page


def test_an_empty_report_reads() -> None:
    assert str(Report(model="M")) == "attnopt report for M\n0 sites: 0 fused, 0 rewritten, 0 declined"


def test_one_site_is_singular() -> None:
    assert "1 site: 1 fused" in str(Report((_site("0", spec=CAUSAL),)))


def test_a_report_can_be_copied_pickled_and_hashed(report: Report) -> None:
    assert copy.deepcopy(report) == report
    assert pickle.loads(pickle.dumps(report.sites[0])) == report.sites[0]
    assert hash(report.sites[0].error) == hash(copy.deepcopy(report.sites[0].error))


def test_an_unknown_status_is_an_error() -> None:
    with pytest.raises(AttnoptError, match="fused, rewritten, declined"):
        Site("a", status="skipped")


def test_figures_are_frozen_and_plain() -> None:
    inner = {"x": 1.0}
    figures = Figures({"a": inner, "b": [1, 2]})
    inner["x"] = 5.0
    assert figures["a"]["x"] == 1.0
    assert figures["b"] == (1, 2)
    assert figures == {"a": {"x": 1.0}, "b": (1, 2)}
    with pytest.raises(TypeError):
        figures["a"] = 2  # type: ignore[index]
    with pytest.raises(KeyError):
        _ = figures["c"]
    with pytest.raises(AttnoptError, match="a figure is"):
        Figures({"a": object()})


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.23456e-7, "1.23e-07"), (3, "3"), (True, "yes"), (None, "-"), ((1, 2.0), "1, 2"), (Figures({"a": 1}), "a 1")],
)
def test_figures_read_short(value: object, text: str) -> None:
    assert show_figure(value) == text
