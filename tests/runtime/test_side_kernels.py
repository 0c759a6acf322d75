"""What is left to torch after a kernel, when kernels are trusted, and when they are not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from attnopt.analysis.plain import weights_of
from attnopt.options import Options
from attnopt.runtime.pairs import defined
from attnopt.runtime.side_kernels import Trusted, by_kernel, completed, rows_of
from attnopt.spec import AttentionSpec, EmptyRow
from tests.runtime.cases import CAUSAL, inputs, padded


class Made:
    """A kernel made of the definition; `factor` breaks it."""

    problem = ""

    def __init__(self, spec: AttentionSpec, factor: float = 1.0) -> None:
        self.spec, self.factor = replace(spec, empty_row=EmptyRow.ZERO), factor

    def __call__(
        self, q: Tensor, k: Tensor, rows: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str
    ) -> Tensor:
        return self.factor * defined(self.spec, q, k, captures, scalars, name)


@pytest.mark.parametrize("policy", list(EmptyRow))
def test_rows_without_keys_are_added_to_columns(policy: EmptyRow) -> None:
    spec = weights_of(padded(policy))
    q, k, _ = inputs(spec)
    pad = [torch.tensor([[True] * 4 + [False] * 3, [False] * 7])]
    rows = rows_of(spec, q, k, pad, ())
    made = completed(spec, Made(spec)(q, k, rows, pad, (), "column_mass"), rows, "column_mass")
    assert_close(made, defined(spec, q, k, pad, (), "column_mass"), equal_nan=True)
    assert Trusted(spec, Made(spec)).problem(q, k, pad, (), "column_mass", True) == ""


def test_a_spoilt_row_spoils_its_columns() -> None:
    spec = weights_of(CAUSAL)
    rows = torch.zeros(1, 4, 3, 2)
    rows[0, 1, 2, 1] = torch.nan
    made = completed(spec, torch.ones(1, 4, 5), rows, "column_mass")
    assert made.isnan().all(-1).tolist() == [[False, True, False, False]]


def test_a_kernel_that_is_wrong_is_not_used_again() -> None:
    spec = weights_of(CAUSAL)
    q, k, _ = inputs(CAUSAL)
    trusted = Trusted(spec, Made(spec, 1.001))
    said = trusted.problem(q, k, (), (), "weights", True)
    assert "its weights disagrees with the reference" in said
    assert trusted.problem(q, k, (), (), "column_mass", False) == said
    assert Trusted(spec, Made(spec, 1.001)).problem(q, k, (), (), "weights", False) == ""


def test_loads_that_leave_their_tensor_are_found() -> None:
    spec = weights_of(padded(EmptyRow.ZERO))
    q, k, _ = inputs(spec)
    said = Trusted(spec, Made(spec)).problem(q, k, [torch.ones(2, 3, dtype=torch.bool)], (), "weights", True)
    assert "pad" in said


def test_nothing_is_said_where_no_kernel_is_expected() -> None:
    q, k, _ = inputs(CAUSAL, dtype=torch.float64)
    said: list[str] = []
    for options, x in ((Options(), q), (Options(disable=True), q.float())):
        assert by_kernel(CAUSAL, x, k.to(x.dtype), x, (), (), "weights", options, said.append) is None
    assert not said
