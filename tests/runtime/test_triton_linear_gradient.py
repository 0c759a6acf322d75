"""Which gradients of linear attention have kernels; `test_triton_linear` compares them with fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attnopt.analysis.linear_form import linear_form
from attnopt.options import Options
from attnopt.runtime.triton_linear_gradient import _fixed, applies, gradients
from tests.runtime import test_linear as plain
from tests.runtime import test_mixed as beside


def test_where_the_forward_has_a_linear_part() -> None:
    for name, inputs, length, expected in (
        ("causal", plain, 700, True),
        ("causal", plain, 20, False),
        ("causal", beside, 20, True),
    ):
        qkv, _ = inputs.inputs(inputs.SPECS[name], length, length)
        assert applies(inputs.SPECS[name], qkv[0], qkv[1]) is expected


@pytest.mark.parametrize(
    ("name", "needs", "said"), [("decay", True, "rate"), ("decay", False, ""), ("padded", True, "pad")]
)
def test_factors_of_weights_are_fixed(name: str, needs: bool, said: str) -> None:
    form = linear_form(plain.SPECS[name])
    assert form is not None
    found = _fixed(plain.SPECS[name], form, (True, True, True, needs))
    assert found.startswith(said)
    assert bool(found) == bool(said)


@pytest.mark.parametrize("change", ["double", "nothing", "empty"])
def test_no_gradient_and_no_word_where_there_is_nothing_to_do(change: str) -> None:
    given, heard = plain.SPECS["causal"], []
    dtype = torch.float64 if change == "double" else torch.float32
    qkv, _ = plain.inputs(given, 0 if change == "empty" else 20, 20, dtype)
    grad = torch.zeros(2, 4, qkv[0].shape[2], 6)
    needs: Any = [change != "nothing"] * 3
    assert gradients(given, grad, qkv, (), needs, heard.append, Options()) is None
    assert not heard


def test_a_learned_rate_is_said() -> None:
    given, heard = plain.SPECS["decay"], []
    qkv, captures = plain.inputs(given, 20, 20, torch.float32)
    found = gradients(given, torch.zeros(2, 4, 20, 6), [*qkv, *captures], (), [True] * 4, heard.append, Options())
    assert found is None
    assert len(heard) == 1
    assert "rate takes part in the weights" in heard[0]
