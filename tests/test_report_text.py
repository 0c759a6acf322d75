"""The report's text: names folded, equal declines together, bystanders on request."""

from __future__ import annotations

import pytest

from attnopt.report import Bystander, Report, Site
from attnopt.report_text import spans


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a"], "a"),
        (["h.0.attn", "h.1.attn"], "h.0.attn, h.1.attn"),
        ([f"h.{i}.attn" for i in range(12)], "h.{0-11}.attn"),
        ([f"h.{i}.attn" for i in (0, 2, 3, 4, 9)], "h.{0,2-4,9}.attn"),
        ([f"s.{i}.b.{j}.attn" for i in (0, 1) for j in (0, 1, 2)], "s.{0-1}.b.{0-2}.attn"),
        # Not every combination occurs: folding would claim too much.
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.2.b.5"], "s.0.b.0, s.0.b.1, s.1.b.0, s.2.b.5"),
        (["enc.0.a", "enc.1.a", "dec.0.a", "dec.1.a", "head"], "enc.{0-1}.a, dec.{0-1}.a, head"),
        (["x", "x", "x", "x"], "x"),
    ],
)
def test_names_are_folded_only_where_that_says_the_same(names: list[str], text: str) -> None:
    assert spans(names) == text


def test_equal_declines_are_told_once_with_all_places() -> None:
    common = {"status": "declined", "source": "m.py:3", "pattern": "softmax", "hint": "do that"}
    sites = [
        Site(f"s{i}", f"h.{i}.attn", reason=f"why (at %s_{i})", node=f"%s_{i} = aten::sort", **common) for i in range(5)
    ]
    other = Site("s9", "h.9.attn", reason="another why", **common)
    text = str(Report((*sites, other)))
    assert (
        "  h.{0-4}.attn: why (at %s_0)\n    m.py:3; nearest pattern softmax\n    stopped at %s_0 = aten::sort" in text
    )
    assert text.count("to lift it: do that") == 2
    assert "h.9.attn: another why" in text


def test_notes_that_differ_in_numbers_are_told_once() -> None:
    notes = ["h.0.attn: %softmax is used", *(f"h.{i}.attn: %softmax_{i} is used" for i in range(1, 12)), "another"]
    lines = str(Report(notes=tuple(notes))).splitlines()
    assert lines[-2:] == ["  h.0.attn: %softmax is used (and 11 more like this)", "  another"]


def test_bystanders_are_counted_and_listed_on_request() -> None:
    report = Report(others=(Bystander("softmax_3", "router", "moe.py:7", "its result goes to topk"),))
    assert "1 softmax is no attention (attnopt explain --all lists them)" in str(report)
    assert "router" not in str(report)
    assert "  router: its result goes to topk (moe.py:7)" in report.to_text(every=True)
    assert Report.from_json(report.to_json()) == report
