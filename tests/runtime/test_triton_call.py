"""Launchers are called plan by plan until one fits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_plans import CHIPS, plans
from attnopt.errors import CompileError
from attnopt.runtime import triton_call
from attnopt.runtime.triton_call import device_name, launch
from tests.specs import case

SPEC = case("scale").spec
KERNELS = [triton.emit(SPEC, Layout("bfloat16"), p) for p in plans(CHIPS["sm_90"], "bfloat16", 64, 64)[:2]]


class OutOfResources(Exception):  # noqa: N818
    """As Triton's, by name."""


def test_plans_that_do_not_fit_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(kernel: triton.TritonKernel) -> Any:
        def attention(*given: Any, **more: Any) -> Any:
            if kernel is KERNELS[0]:
                raise OutOfResources("shared memory")
            return given, more

        return SimpleNamespace(attention=attention)

    monkeypatch.setattr(triton_call, "load", module)
    left = list(KERNELS)
    assert launch(left, (1, 2), lambda plan: {"plan": plan}) == ((1, 2), {"plan": KERNELS[1].plan})
    assert left == KERNELS[1:]
    with pytest.raises(CompileError, match="shared memory"):
        launch(KERNELS[:1], (), {})


def test_what_the_compiler_cannot_build_is_a_matter_of_the_plan() -> None:
    class PTXASError(Exception):
        """As Triton's, by name."""

    assert triton_call.of_plan(PTXASError("too many registers"))
    assert triton_call.of_plan(RuntimeError("PassManager::run failed"))
    assert not triton_call.of_plan(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_device_without_a_driver_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: object) -> str:
        raise AssertionError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    assert device_name(torch.device("cuda")) == ""
