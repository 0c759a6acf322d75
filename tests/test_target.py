"""Targets of commands: every form of a factory, and what each mistake is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnopt.errors import OptionError
from attnopt.target import load

MODULE = """
import torch
from torch import nn

class Plain(nn.Module):
    def forward(self, x):
        return x * 2

class Own(Plain):
    dummy_inputs = {"x": torch.zeros(3)}

class Array(Plain):
    example_input_array = torch.zeros(4)

x = torch.zeros(2)
pair, triple = (lambda: (Plain(), (x,))), (lambda: (Plain(), [], {"x": x}))
model, own, array = Plain(), Own, Array
ready = (Plain(), (x,))
empty, number, four = (lambda: (Plain(), ())), (lambda: 3), (lambda: (1, 2, 3, 4))

def failing():
    raise ValueError("no weights here")

def asking(size):
    return size
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "target_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MODULE)
    (package / "broken.py").write_text("import a_module_that_is_not_there")
    (package / "wrong.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.startswith("target_package")]:
        monkeypatch.delitem(sys.modules, name)
    return "target_package.models"


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [("pair", 1, []), ("ready", 1, []), ("triple", 0, ["x"]), ("own", 0, ["x"]), ("array", 1, [])],
)
def test_every_form_gives_model_and_inputs(module: str, name: str, args: int, kwargs: list[str]) -> None:
    path = list(sys.path)
    model, given, named = load(f"{module}:{name}")
    assert (len(given), list(named)) == (args, kwargs)
    model(*given, **named)
    assert sys.path == path


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gpt2", "'gpt2' is neither MODULE:NAME nor hf:MODEL_TYPE"),
        ("a_module_that_is_not_there:f", "cannot import 'a_module_that_is_not_there'"),
        ("target_package.absent:f", "cannot import 'target_package.absent'"),
        ("target_package.broken:f", "needs another module: No module named 'a_module_that_is_not_there'"),
        ("target_package.wrong:f", "it raised SyntaxError"),
        ("target_package.models:absent", "has no 'absent'; it has Array"),
        ("target_package.models:model", "gave a Plain without inputs. Return (model, args)"),
        ("target_package.models:empty", "gave a model without inputs"),
        ("target_package.models:number", "it gave int"),
        ("target_package.models:four", "it gave a tuple of int, int, int, int"),
        ("target_package.models:failing", "raised ValueError: no weights here"),
        ("target_package.models:asking", "was called without arguments and raised TypeError"),
    ],
)
def test_a_mistake_is_told_what_was_seen_and_what_to_do(module: str, target: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        load(target)
    assert message in str(error.value)
