"""Every dtype is read and written as torch does: all bit patterns of a 16-bit float come back unchanged."""

from __future__ import annotations

import pytest
import torch

from attnopt.codegen.base import Plan
from attnopt.codegen.cpp_elements import elements, half_type
from attnopt.spec import AttentionSpec, Heads
from tests.codegen.harness import run


def test_half_is_defined_only_where_it_is_used() -> None:
    assert "half" not in elements(False)
    assert half_type(False) == ""
    assert "vcvtph2ps" in elements(True)


@pytest.mark.parametrize("form", ["tile", "stream"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_single_key_returns_its_value(dtype: torch.dtype, form: str) -> None:
    """With one key the weight is one, so that the result is the value itself, read and written once."""
    bits = torch.arange(0, 1 << 16, 7, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()][: 8 * 1000].reshape(1000, 1, 1, 8)
    # Subnormal bfloat16 values are subnormal floats, which are multiplied by one all the same.
    zero = torch.zeros(1000, 1, 1, 8, dtype=dtype)
    out, _ = run(AttentionSpec(Heads(1, 1, 1, 8, 8)), [zero, zero, values], plan=Plan(8, 16, 8, 2, form))
    assert torch.equal(out, values)
