"""Devices and names; shapes and dtypes are tested through the operator in test_dispatch."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import ShapeError
from attnopt.runtime.inputs import check_inputs, dtype_name
from tests.runtime.cases import BIASED, inputs


def test_mixed_devices_are_named() -> None:
    q, k, v = inputs(BIASED)
    with pytest.raises(ShapeError, match="they are on cpu, meta. Move the inputs"):
        check_inputs(BIASED, q, k, v, [torch.empty(4, 5, 7, device="meta")], [])


def test_dtype_name() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
