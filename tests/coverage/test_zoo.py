"""The fast part of the zoo: no fused site is lost, none is missed, and the outputs agree.

`expected.json` says how many sites of each architecture are fused. A larger number may replace a smaller one there;
a smaller one is a loss.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnopt.coverage.measure import measure
from attnopt.coverage.totals import outside
from attnopt.options import Options

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

EXPECTED: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("expected.json").read_text())
ROWS = [(name, variant, fused) for variant, table in EXPECTED.items() for name, fused in table.items()]
# The kernels have their own tests; here the question is what is found, and whether it is what the model computes.
REFERENCE = Options(kernel="reference")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """Small tensors gain nothing from threads, and the workers share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "variant", "fused"), ROWS, ids=[f"{n}-{v}" for n, v, _ in ROWS])
def test_no_fused_site_is_lost(name: str, variant: str, fused: int) -> None:
    row = measure(name, variant, REFERENCE)
    assert row["status"] == "measured", row.get("reason")
    declined = [f"{s['module']}: {s['reason']}" for s in row["sites"] if s["status"] != "fused"]
    assert len(row["sites"]) - len(declined) >= fused, f"lost: {declined}"
    assert row["missed"] == []
    assert outside(row) == ""


def test_the_table_is_wide_enough() -> None:
    assert len(EXPECTED["eager"]) >= 60
    assert all(fused > 0 for table in EXPECTED.values() for fused in table.values())
    assert {"eager", "sdpa", "decode", "decode-static"} == set(EXPECTED)
