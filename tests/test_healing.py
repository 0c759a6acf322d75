"""`heal` brings a rewritten model closer to the model it came from, and leaves both as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import OptionError, ValidationError
from attnopt.rewrites import ShareKV
from tests.passes.tiny import model

DATA = [(torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(i)),) for i in range(4)]


class Named(nn.Module):
    """A linear map whose output has `.logits`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.map = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> Any:
        """[examples, 6] to an object with `.logits` [examples, 5]."""
        return SimpleNamespace(logits=self.map(x))


def test_a_rewritten_model_comes_closer_and_nothing_else_changes() -> None:
    teacher, x = model("separate")
    teacher.train()
    fast = attnopt.optimize(
        teacher.eval(), (x,), rewrites=[ShareKV(2, method="mean")], tolerance=1e6, calibration=DATA, validate=False
    )
    teacher.train()
    states = [{n: t.clone() for n, t in m.state_dict().items()} for m in (teacher, fast)]
    healed = attnopt.heal(fast, teacher, DATA, steps=30, lr=1e-2, progress=False)
    figures = healed.healing
    assert (figures.steps, figures.loss) == (30, "mse")
    assert figures.after < 0.5 * figures.before
    assert healed.k.weight.shape == (12, 24)
    assert not healed.training
    assert teacher.training
    for module, state in zip((teacher, fast), states, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None for m in (teacher, healed) for p in m.parameters())
    with torch.no_grad():
        gaps = [(m(*DATA[0]) - teacher.eval()(*DATA[0])).square().mean() for m in (healed, fast)]
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize(("loss", "name"), [("auto", "kl"), ("kl", "kl"), ("cosine", "cosine"), (None, "gap")])
def test_losses(loss: Any, name: str) -> None:
    def gap(a: Any, b: Any) -> torch.Tensor:
        return (a.logits - b.logits).abs().mean()

    data = [{"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    found = {"cosine": lambda a, b: 1 - torch.cosine_similarity(a.logits, b.logits, -1).mean()}.get(name, gap)
    given = loss if loss in ("auto", "kl") else found if name == "cosine" else gap
    healed = attnopt.heal(Named(0), Named(1), iter(data), steps=40, lr=3e-2, loss=given, progress=False)
    assert healed.healing.after < 0.5 * healed.healing.before
    if name != "cosine":
        assert healed.healing.loss == name


def test_only_the_named_parameters_are_trained() -> None:
    student = Named(0)
    data = [(torch.randn(4, 6),)]
    healed = attnopt.heal(student, Named(1), data, 3, parameters=lambda n: n.endswith("bias"), progress=False)
    assert torch.equal(healed.map.weight, student.map.weight)
    assert not torch.equal(healed.map.bias, student.map.bias)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "x"}, "the model must be"),
        ({"teacher": None}, "the teacher must be"),
        ({"steps": 0}, "steps must be a positive"),
        ({"lr": -1.0}, "lr must be a positive"),
        ({"loss": "l1"}, "choose auto, kl, mse, cosine"),
        ({"data": torch.ones(2)}, "data must be inputs"),
        ({"data": []}, "data is empty"),
        ({"data": [torch.ones(2)]}, "each input must be"),
        ({"parameters": lambda name: False}, "no parameter to train"),
        ({"parameters": "all"}, "parameters must be a function"),
        ({"clip": -1.0}, "clip must be a number, more than 0, not -1.0"),
        ({"clip": 0}, "clip must be a number"),
        ({"weight_decay": "x"}, "weight_decay must be a number, 0 or more"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    given = {"model": Named(0), "teacher": Named(1), "data": [(torch.ones(1, 6),)], "steps": 2, "progress": False}
    with pytest.raises(OptionError, match=says):
        attnopt.heal(**{**given, **change})
    with pytest.raises(OptionError, match="the same module"):
        attnopt.heal(given["teacher"], given["teacher"], given["data"], 1)


def test_outputs_without_logits_and_losses_that_explode_are_errors() -> None:
    data = [(torch.ones(1, 4),)]
    with pytest.raises(OptionError, match="needs outputs with .logits"):
        attnopt.heal(nn.Linear(4, 2), nn.Linear(4, 2), data, 1, loss="kl", progress=False)
    with pytest.raises(ValidationError, match="smaller lr"):
        attnopt.heal(nn.Linear(4, 2), nn.Linear(4, 2), data, 1, loss=lambda a, b: a.sum() / 0, progress=False)
