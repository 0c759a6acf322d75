"""Gradients by Triton: the reference is asked first, and takes over with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import CompileError
from attnopt.runtime import triton_gradient
from attnopt.runtime.gradient import gradients as by_reference
from attnopt.runtime.triton_gradient import Kernels, expected, gradients
from tests.specs import case

SPEC = case("bias").spec
NEEDS = [True, True, True, True]


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_gradient, "chip_of", lambda device: CHIPS["sm_90"])
    triton_gradient._KNOWN.clear()
    yield
    triton_gradient._KNOWN.clear()


def tensors() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, n, 32, generator=generator) for n in (11, 13, 13))
    return torch.randn(2, 4, 11, 32, generator=generator), [q, k, v, torch.randn(4, 11, 13, generator=generator)]


def stand_in(monkeypatch: pytest.MonkeyPatch, factor: float = 1.0) -> list[int]:
    """Kernels that are the reference, times a factor."""
    calls: list[int] = []

    def run(
        self: Kernels, grad: Tensor, dlse: Tensor | None, given: list[Tensor], scalars: list[int], backward: object
    ) -> dict[int, Tensor]:
        calls.append(given[0].shape[2])
        return {
            i: factor * g for i, g in enumerate(expected(self.spec, grad, dlse, given, scalars, NEEDS, torch.float32))
        }

    monkeypatch.setattr(Kernels, "run", run)
    return calls


def test_kernels_that_agree_are_used(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = stand_in(monkeypatch), []
    grad, given = tensors()
    found = gradients(SPEC, grad, None, given, (), NEEDS, said.append)
    assert found is not None
    for x, y in zip(found, by_reference(SPEC, grad, None, given, (), NEEDS), strict=True):
        torch.testing.assert_close(x, y)
    gradients(SPEC, grad, None, given, (), NEEDS, said.append)
    assert len(calls) == 3  # once more to be compared, before the first use
    assert not said


def test_kernels_that_disagree_are_not(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = stand_in(monkeypatch, 1.01), []
    grad, given = tensors()
    assert gradients(SPEC, grad, None, given, (), NEEDS, said.append) is None
    assert gradients(SPEC, grad, None, given, (), NEEDS, said.append) is None
    assert "gradient of q disagrees" in said[0]
    assert len(calls) == 1


def test_reasons(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    grad, given = tensors()
    assert gradients(replace(SPEC, dropout=0.5), grad, None, given, (), NEEDS, said.append) is None
    assert "no dropout" in said[-1]
    assert gradients(SPEC, grad, None, given, (), NEEDS, said.append) is None  # no driver here
    assert said[-1].startswith("no Triton kernel for these gradients")

    def unknown(device: torch.device) -> None:
        raise CompileError("no plans are known for this chip")

    monkeypatch.setattr(triton_gradient, "chip_of", unknown)
    assert gradients(SPEC, grad, None, given, (), NEEDS, said.append) is None
    assert "no plans are known" in said[-1]


def test_nothing_to_do(chip: None) -> None:
    grad, given = tensors()
    assert gradients(SPEC, grad, None, given, (), [False] * 4, print) is None
    assert gradients(SPEC, grad[:0], None, [t[:0] for t in given], (), NEEDS, print) is None
