"""A rival computes the same attention, or is left out."""

from __future__ import annotations

import time

import pytest
import torch
from torch.testing import assert_close

from attnopt.bench import rivals
from attnopt.bench.cases import Case, cases
from attnopt.bench.rivals import flex, grid_of, sdpa
from attnopt.runtime.reference import reference

NAMES = ("documents", "dilated", "ALiBi", "T5 bias", "dense bias", "padding", "prefix", "Swin 49x49x32")
ROWS = [row for row in cases(quick=True) if row.name in NAMES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_sdpa_computes_the_row(row: Case) -> None:
    captures = [make() for make in row.makers]
    call = sdpa(row, captures)
    assert call is not None
    q, k, v = row.inputs()
    assert_close(call(q, k, v), reference(row.spec, q, k, v, captures)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["soft-cap", "sinks"])
def test_sdpa_is_left_out_where_it_cannot(name: str) -> None:
    row = next(row for row in cases(quick=True) if row.name == name)
    assert sdpa(row, [make() for make in row.makers]) is None


FLEX = [row for row in cases(quick=True) if row.name in rivals._FLEX]


@pytest.mark.parametrize("row", FLEX, ids=lambda row: row.name)
def test_flex_computes_the_row(row: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    captures = [make() for make in row.makers]
    call = flex(row, captures)
    assert call is not None
    q, k, v = row.inputs()
    with torch.no_grad():
        assert_close(call(q, k, v), reference(row.spec, q, k, v, captures)[0], atol=2e-5, rtol=1e-4)


def test_the_faster_way_that_runs_is_taken() -> None:
    q = torch.ones(1)
    calls: list[str] = []

    def way(name: str, seconds: float) -> rivals.Call:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            if seconds < 0:
                raise RuntimeError(f"{name} does not compile")
            time.sleep(seconds)
            return q

        return call

    chosen = rivals._Faster(way("broken", -1), way("slow", 0.2), way("fast", 0))
    chosen(q, q, q)
    chosen(q, q, q)
    assert calls[-2:] == ["fast", "fast"]
    with pytest.raises(RuntimeError, match="broken does not compile"):
        rivals._Faster(way("broken", -1))(q, q, q)


def test_flex_is_named_for_known_rows_only() -> None:
    row = next(row for row in cases(quick=True) if row.name == "sinks")
    assert flex(row, []) is None


def test_grid_has_the_sizes_of_the_row() -> None:
    row = next(row for row in ROWS if row.name == "documents")
    grid = grid_of(row, [make() for make in row.makers])
    assert grid.shape == (row.batch, row.spec.heads.q, row.n_q, row.n_k)
    assert 0 < float(grid.value(row.spec.keep).mean()) < 0.2
