"""Hints: the table has no stale row, and every reason gets an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnopt.errors import Decline
from attnopt.hints import FALLBACK, HINTS, hint_for

ROOT = Path(__file__).resolve().parent.parent / "attnopt"
SOURCES = "\n".join(path.read_text() for path in ROOT.rglob("*.py") if path.name != "hints.py")


@pytest.mark.parametrize("phrase", [phrase for phrase, _ in HINTS])
def test_every_row_belongs_to_a_reason_in_the_source(phrase: str) -> None:
    assert phrase in SOURCES, f"no reason says {phrase!r} any more: drop or mend its row in attnopt/hints.py."


def test_the_first_row_that_fits_counts_and_the_rest_gets_the_fallback() -> None:
    assert hint_for("scores are compared with one another; rounding could differ").startswith("choose the keys by")
    assert hint_for("something new") == FALLBACK
    assert not any(a in b for i, (a, _) in enumerate(HINTS) for b, _ in HINTS[i + 1 :]), "a row that is never reached"


def test_a_decline_may_bring_its_own() -> None:
    assert Decline("why", None, "do this").hint == "do this"
    assert Decline("why").hint == ""
