from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnopt.coverage import run
from attnopt.coverage.run import Plan, load, pending, row_path, settled
from tests.coverage.rows import row, site

pytest.importorskip("transformers")


def test_rows_run_apart_and_land_on_disk(tmp_path: Path) -> None:
    plan = Plan((("vit", "eager"), ("vit", "decode"), ("layoutxlm", "eager")), tmp_path, jobs=1, kernel="reference")
    rows = list(run.run(plan, plan.rows))
    assert {(r["architecture"], r["variant"], r["status"]) for r in rows} == {
        ("vit", "eager", "measured"), ("vit", "decode", "not applicable"), ("layoutxlm", "eager", "not built"),
    }  # fmt: skip
    assert [r["architecture"] for r in load(tmp_path)] == ["layoutxlm", "vit", "vit"]
    assert pending(plan, retry=False) == []
    assert pending(plan, retry=True) == [("layoutxlm", "eager")]


def test_a_row_that_takes_too_long_is_lost_alone(tmp_path: Path) -> None:
    plan = Plan((("llama", "eager"),), tmp_path, jobs=1, seconds=0.01, kernel="reference")
    (row,) = run.run(plan, plan.rows)
    assert (row["status"], row["reason"]) == ("crashed", "it took more than 0 s")
    assert json.loads(row_path(tmp_path, "llama", "eager").read_text()) == row


def test_what_is_settled() -> None:
    assert settled(row())
    assert settled({"status": "not applicable"})
    assert not settled({"status": "not built"})
    assert not settled(row(sites=[site("declined")]))
    assert not settled(row(missed=[{}]))
    assert not settled(row(unknown=[{"why": "", "normalizers": 1}]))
    assert settled(row(unknown=[{"why": "", "normalizers": 0}]))
    assert not settled(row(errors={"units": 40.0}))


def test_an_architecture_with_a_slash_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert row_path(tmp_path, "a/b", "eager").parent == tmp_path
