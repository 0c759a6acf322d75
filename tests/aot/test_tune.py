"""The command that measures plans, with a clock and kernels that are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attnopt.aot import tune as module
from attnopt.aot.tune import sizes, specs, tune
from attnopt.cli import main
from attnopt.codegen.triton_cost import Problem
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import OptionError
from attnopt.options import Options
from attnopt.runtime import triton_gradient, triton_launch, triton_tune


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_names_widths_and_sizes_are_checked() -> None:
    assert [(name, spec.heads.q, spec.heads.d_qk) for name, spec in specs(["dense"], [64, 256])] == [
        ("dense", 32, 64),
        ("dense", 8, 256),
    ]
    assert sizes("2, 3,4") == ((2, 3, 4),)
    assert sizes(None) == ()
    for call in (lambda: list(specs(["denes"], [64])), lambda: list(specs(None, [0])), lambda: sizes("1,2"),
                 lambda: sizes("1,0,2")):  # fmt: skip
        with pytest.raises(OptionError):
            call()


@pytest.mark.parametrize(("kind", "problem"), [("forward", (2, 512, 512)), ("decode", (1, 1, 4096)),
                                               ("backward", (2, 512, 512))])  # fmt: skip
def test_the_last_plan_wins(
    kind: str, problem: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def launch(kernels: list[Any], arguments: Any, more: Any, name: str = "attention", module_of: Any = None) -> Any:
        ran.append(kernels[0].plan)
        return arguments[0], arguments[0]

    def clock(call: Callable[[], Any]) -> float:
        call()
        return 1.0 / len(set(ran))

    monkeypatch.setattr(triton_launch, "launch", launch)
    monkeypatch.setattr(triton_gradient, "launch", launch)
    monkeypatch.setattr(triton_tune, "device_clock", clock)
    options = Options(cache_dir=str(tmp_path / "cache"), tune=True)
    spec = dict(specs(["dense"], [64]))["dense"]
    with FakeTensorMode():
        plan = tune(spec, "bfloat16", CHIPS["sm_90"], kind, Problem(*problem), options)
    measured = [p for p in ran if ran.count(p) > 1]
    assert plan == measured[-1]
    assert len({*measured}) > 1
    assert len(list((tmp_path / "cache").glob("*.note"))) == 1


def test_a_line_for_every_choice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_launch, "chip_of", lambda device: CHIPS["sm_90"])
    monkeypatch.setattr(module, "tune", lambda *given: None)
    assert main(["tune", "--only", "causal", "--width", "64", "--kind", "forward", "--sizes", "1,2,3"]) == 0
    said = capsys.readouterr().out
    assert "causal" in said
    assert "1 x 2 x 3: the default" in said
