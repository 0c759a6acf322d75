"""The products of the backward at widths that are no whole vectors, from memory of any stride."""

from __future__ import annotations

import pytest
import torch

from tests.codegen.test_cpp_backward_skeleton import gradients


@pytest.mark.parametrize("name", ["narrow_values"])
def test_ragged_widths(name: str) -> None:
    code, found, exact = gradients(name, 13, 29, 1)
    assert code == 0
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5 * (1 + float(theirs.abs().max())), rtol=0)
