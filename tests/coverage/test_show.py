from __future__ import annotations

from attnopt.coverage.show import Progress, line, summary
from tests.coverage.rows import row, site


def test_a_row_is_one_line() -> None:
    assert "1/1 fused, 1.00 × eager's error (1.0 s)" in line(row("llama"))
    assert line({"architecture": "a", "variant": "eager", "status": "not built", "reason": "no"}).endswith(
        "not built: no"
    )
    assert "OUTSIDE" in line(row(errors={"units": 50.0}))
    assert "2 fused by Inductor" in line(
        {"architecture": "a", "variant": "inductor", "status": "counted", "fused": 2, "s": 1.0}
    )


def test_the_summary_names_reasons_and_failures() -> None:
    text = summary([row("a"), row("b", sites=[site("declined", reason="because")])], 12.0)
    assert "2 sites, 1 fused, 1 declined, 0 missed" in text
    assert "1 declined: because" in text
    assert text.endswith("12 s")


def test_the_bar_counts_sites() -> None:
    with Progress(2) as progress:
        progress.row(row("a"))
        progress.row({"architecture": "a", "variant": "inductor", "status": "counted", "fused": 0, "s": 0.0})
    assert (progress.totals.rows, progress.totals.fused) == (1, 1)
