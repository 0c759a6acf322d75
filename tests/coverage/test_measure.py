from __future__ import annotations

import pytest
import torch

from attnopt.coverage.measure import errors, measure
from attnopt.options import Options

pytest.importorskip("transformers")
REFERENCE = Options(kernel="reference")


def test_a_row_has_its_sites_and_its_errors() -> None:
    row = measure("llama", "eager", REFERENCE)
    assert row["status"] == "measured"
    assert [s["status"] for s in row["sites"]] == ["fused", "fused"]
    assert row["missed"] == []
    # Two layers of rounding: more than eager's own error, three times over, is another computation.
    assert row["errors"]["units"] < 3
    assert row["errors"]["fp64"] < 1e-12


@pytest.mark.parametrize(
    ("name", "which", "status"),
    [("layoutxlm", "eager", "not built"), ("vit", "decode", "not applicable")],
)
def test_what_there_is_not_is_a_row_with_a_reason(name: str, which: str, status: str) -> None:
    row = measure(name, which, REFERENCE)
    assert row["status"] == status
    assert row["reason"]


def test_errors_are_in_units_of_eagers() -> None:
    exact = [torch.linspace(1, 2, 100, dtype=torch.float64)]
    eager = [(exact[0] + 1e-6).float()]
    ours = [(exact[0] + 3e-6).float()]
    assert errors(ours, eager, exact)["units"] == pytest.approx(3, rel=0.2)
    assert errors([exact[0].float()], [exact[0].float()], exact)["units"] <= 1


def test_numbers_that_come_or_go_are_astray() -> None:
    exact = [torch.tensor([1.0, float("inf")], dtype=torch.float64)]
    eager, ours = [torch.tensor([1.0, float("inf")])], [torch.tensor([1.0, 0.0])]
    assert errors(ours, eager, exact)["astray"] == 1
    assert errors(eager, eager, exact)["astray"] == 0


def test_outputs_of_another_shape_are_not_compared() -> None:
    assert errors([torch.ones(2)], [torch.ones(3)], None)["units"] is None
