from __future__ import annotations

import json

from attnopt.coverage.report import to_json, to_markdown
from tests.coverage.rows import row, site

ROWS = [
    row("alpha"),
    row(
        "convbert",
        sites=[site("declined", reason="no contraction of queries and keys makes the scores", module="attention")],
    ),
    row("open", sites=[site("declined", reason="a riddle (at %x)")]),
    row("wrong", errors={"units": 900.0, "fp64": 0.5}),
    row("blind", missed=[{"name": "softmax", "module": "layer.3", "source": "a.py:1"}]),
    row("dark", unknown=[{"why": "data | sizes", "normalizers": 2}]),
    {"architecture": "none", "variant": "eager", "status": "not built", "reason": "needs timm | natten"},
    {"architecture": "alpha", "variant": "inductor", "status": "counted", "fused": 0, "s": 2.0},
]


def test_every_model_decline_miss_and_failure_is_in_the_report() -> None:
    text = to_markdown(ROWS)
    assert "| alpha | eager | 1 | 1 | 1.00 | 1 × self, causal, padding (Inductor 0) |" in text
    assert "A dynamic convolution" in text
    assert "**a riddle**" in text
    assert "Open: no explanation yet." in text
    assert "- wrong (eager): the outputs move by 5.0e-01 in fp64" in text
    assert "- blind (eager), `layer.3`, `a.py:1`" in text
    assert "- dark (eager), 2 calls that may make weights: data \\| sizes" in text
    assert "| none | needs timm \\| natten |" in text
    assert "0 of 1 sites in 1 models; attnopt 1" in text


def test_the_json_has_the_figures_and_a_line_a_row() -> None:
    data = json.loads(to_json(ROWS))
    assert (data["sites"], data["fused"], data["missed"], data["outside"]) == (6, 4, 1, 1)
    assert data["unknown_graphs"] == 1
    assert data["declined"] == {"a riddle": 1}
    assert [m["architecture"] for m in data["models"]] == sorted(r["architecture"] for r in ROWS)


def test_no_rows_are_a_report_too() -> None:
    assert "| architectures | 0 |" in to_markdown([])
    assert json.loads(to_json([]))["sites"] == 0
