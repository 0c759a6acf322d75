"""The rows of the table are sound attentions that a kernel exists for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp

from attnopt.bench.cases import Case, cases, scores, tiles, unmodified
from attnopt.codegen import cpp
from attnopt.expr import k, q
from attnopt.runtime.inputs import check_inputs
from attnopt.runtime.native import layout_of
from tests.specs import case

ROWS = cases(quick=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_fits_its_inputs_and_has_a_kernel(row: Case) -> None:
    row.spec.verify()
    captures = [make() for make in row.makers]
    inputs = row.inputs()
    check_inputs(row.spec, *inputs, captures, ())
    assert cpp.supported(row.spec, layout_of(cpp.k_axes(row.spec), inputs[0], captures)) is None


@pytest.mark.parametrize("row", [row for row in ROWS if row.beside], ids=lambda row: row.name)
def test_what_a_row_is_compared_with_has_its_sizes_and_no_modification(row: Case) -> None:
    plain = unmodified(row)
    assert plain is not None
    assert (plain.batch, plain.n_q, plain.n_k, plain.dtype) == (row.batch, row.n_q, row.n_k, row.dtype)
    assert plain.spec.heads == row.spec.heads
    assert not plain.spec.captures
    assert plain.spec.keep in (row.spec.keep, sp.true)
    assert {"own"} <= set(row.targets)


def test_a_plain_row_is_compared_with_nothing() -> None:
    assert unmodified(ROWS[0]) is None


def test_names_are_distinct() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_kept_scores_are_counted() -> None:
    row = Case("triangle", case("causal").spec, 2, 6, 6)
    assert row.spec.keep == sp.Ge(q - k, 0) or row.spec.keep == (k <= q)
    assert scores(row) == 2 * 4 * 21


def test_tiles_with_a_kept_score_are_counted() -> None:
    row = Case("triangle", case("causal").spec, 2, 130, 130)
    assert tiles(row) == 2 * 4 * 6
    assert tiles(replace(row, spec=case("scale").spec)) == 2 * 4 * 9
