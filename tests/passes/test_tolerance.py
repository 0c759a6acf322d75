"""Tolerances, and the figures they are compared with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnopt.errors import OptionError, ShapeError
from attnopt.passes.tolerance import Calibration, Change, Tolerance, first_floating, next_token_loss
from tests.passes.tiny import captured


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x * self.scale


@pytest.mark.parametrize(
    "arguments", [{}, {"output": 0.0}, {"output": -1}, {"loss": math.nan}, {"loss": math.inf}, {"output": True}]
)
def test_limits_that_make_no_sense(arguments: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="Tolerance"):
        Tolerance(**arguments)


def test_a_number_limits_the_output_and_anything_else_is_an_error() -> None:
    assert Tolerance.make(0.1) == Tolerance(output=0.1)
    assert Tolerance.make(None) is None
    with pytest.raises(OptionError, match="must be an attnopt"):
        Tolerance.make("5%")  # type: ignore[arg-type]


def test_what_exceeds_is_said_with_the_figure() -> None:
    change = Change(output=0.2, loss_before=1.0, loss_after=1.5)
    assert Tolerance(output=0.3, loss=0.6).exceeded(change) is None
    assert "output changed by 0.2" in (Tolerance(output=0.1).exceeded(change) or "")
    assert "loss changed by 0.5" in (Tolerance(output=0.3, loss=0.1).exceeded(change) or "")
    assert "loss changed by 0.5" in (Tolerance(loss=0.4).exceeded(Change(0.0, 4.0, 2.0)) or "")
    assert Tolerance(loss=1e9).exceeded(Change(0.0, 0.0, 1.0)) is not None
    assert Tolerance(loss=1e-9).exceeded(Change(0.0, 0.0, 0.0)) is None
    assert Tolerance(output=1.0).exceeded(Change(math.nan, 0.0, 0.0)) is not None


def test_change_is_relative_and_runs_leave_buffers_alone() -> None:
    net, x = _Net(), torch.randn(3, 4)
    found = captured(net, x)
    tensors = {"scale": net.scale, "seen": net.seen}
    calibration = Calibration.make(found, [(x,), (2 * x,)], ((x,), {}))
    before = calibration.baseline(found.gm, tensors)
    change = calibration.change(before, found.gm, {**tensors, "scale": nn.Parameter(torch.tensor(3.0))})
    assert change.output == pytest.approx(0.5)
    assert change.loss_after == pytest.approx(2.25 * change.loss_before)
    assert net.seen.item() == 0


def test_what_was_nan_before_did_not_change() -> None:
    net, x = _Net(), torch.tensor([1.0, math.nan, 2.0])
    found = captured(net, x)
    tensors = {"scale": net.scale, "seen": net.seen}
    calibration = Calibration.make(found, None, ((x,), {}))
    before = calibration.baseline(found.gm, tensors)
    assert calibration.change(before, found.gm, tensors).output == 0
    assert calibration.change(before, found.gm, {**tensors, "scale": torch.tensor(math.nan)}).output != 0


def test_the_loss_is_the_outputs_own_where_there_is_one() -> None:
    calibration = Calibration((), (), torch.utils._pytree.tree_structure([0]))
    assert calibration.loss([torch.tensor([1.0, 3.0])]).item() == 5
    named = Calibration((), (), torch.utils._pytree.tree_structure([0]), lambda output: output[0].sum())
    assert named.loss([torch.tensor([1.0, 3.0])]).item() == 4


@pytest.mark.parametrize("given", [torch.ones(2), {}, [], "x", [torch.ones(2)]])
def test_calibration_of_another_form_is_an_error(given: object) -> None:
    with pytest.raises(OptionError, match="calibration"):
        Calibration.make(SimpleNamespace(flatten=None, states=(), out_spec=None), given, ((), {}))


def test_calibration_inputs_must_fit_the_capture() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ShapeError, match="must be 4"):
        Calibration.make(captured(_Net(), x), [(torch.randn(3, 5),)], ((x,), {}))


def test_a_model_without_floating_outputs_cannot_be_measured() -> None:
    assert first_floating([torch.tensor(1.0), torch.ones(2)]).dim() == 1
    with pytest.raises(OptionError, match="no floating tensor"):
        first_floating([torch.tensor(1)])


def test_a_loss_may_read_the_inputs() -> None:
    logits, tokens = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    calibration = Calibration((), (), torch.utils._pytree.tree_structure([0]), next_token_loss)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert calibration.loss([logits], [torch.ones(2, 4), tokens]).item() == pytest.approx(expected.item())
    with pytest.raises(OptionError, match="needs logits"):
        calibration.loss([logits], [torch.ones(2, 4)])
