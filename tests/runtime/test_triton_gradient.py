"""Gradients by Triton: the reference is asked first, and takes over with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from attnopt import expr as ex
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import triton_gradient, triton_launch
from attnopt.runtime.gradient import expected
from attnopt.runtime.gradient import gradients as by_reference
from attnopt.runtime.triton_gradient import Kernels, gradients, recorded_text
from attnopt.spec import Pointwise
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
        self: Kernels,
        grad: Tensor,
        dlse: Tensor | None,
        given: list[Tensor],
        scalars: list[int],
        backward: object,
        saved: object = None,
    ) -> dict[int, Tensor]:
        assert dlse is None or dlse.is_contiguous()
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


def test_the_gradient_of_a_summed_lse_is_read_without_strides(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum's gradient is one number expanded, which a kernel that reads row by row would leave behind."""
    stand_in(monkeypatch)
    grad, given = tensors()
    spec, dlse = replace(SPEC, returns=("lse",)), torch.tensor(0.5).expand(2, 4, 11)
    found = gradients(spec, grad, dlse, given, (), NEEDS, print)
    assert found is not None
    for x, y in zip(found, by_reference(spec, grad, dlse, given, (), NEEDS), strict=True):
        torch.testing.assert_close(x, y)


def test_loads_that_leave_their_tensor_are_not_launched(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = stand_in(monkeypatch), []
    grad, given = tensors()
    given[3] = given[3][:, :, :12]
    assert gradients(SPEC, grad, None, given, (), NEEDS, said.append) is None
    assert "reads bias at 0..12 along dimension 2 of size 12" in said[0]
    assert not calls


def test_rows_whose_elements_lie_far_apart_are_not_launched(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, said = stand_in(monkeypatch), []
    grad, given = tensors()
    far = torch.empty_strided(grad.shape, (0, 0, 0, 1 << 26), device="meta")
    assert not triton_launch.wide(grad)
    assert gradients(SPEC, far, None, given, (), NEEDS, said.append) is None
    assert "further apart" in said[0]
    assert not calls


def test_one_key_is_not_judged(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, 1.01)
    grad, given = tensors()
    one = [given[0], *(t[:, :, :1] for t in given[1:3]), given[3][:, :, :1]]
    assert gradients(SPEC, grad, None, one, (), NEEDS, print) is not None
    assert len(calls) == 1
    assert gradients(SPEC, grad, None, given, (), NEEDS, lambda text: None) is None


def test_the_check_can_be_left_out(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, 1.01)
    grad, given = tensors()
    assert gradients(SPEC, grad, None, given, (), NEEDS, print, Options(first_use_check=False)) is not None
    assert len(calls) == 1


def test_what_the_forward_kept_is_not_made_again(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def again(self: Kernels, tensors: Any, scalars: Any) -> tuple[Tensor, Tensor]:
        made.append("again")
        return out, lse

    def launched(kernels: Any, arguments: Any, more: Any, name: str, module_of: Any) -> tuple[Tensor, ...]:
        assert arguments[-4] is out
        assert arguments[-3] is lse
        return tuple(given[:3])

    spec, (grad, given) = case("causal").spec, tensors()
    out, lse = grad.clone(), grad[..., 0].contiguous()
    monkeypatch.setattr(Kernels, "_results", again)
    monkeypatch.setattr(triton_gradient, "launch", launched)
    options = Options(first_use_check=False)
    needs = [True, True, True]
    for saved, count in (((out, lse), 0), ((None, None), 1), ((out, torch.empty(0)), 2)):
        assert gradients(spec, grad, None, given[:3], (), needs, print, options, saved) is not None
        assert len(made) == count


def test_weights_that_no_row_divides_need_no_forward(chip: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(kernels: Any, arguments: Any, more: Any, name: str, module_of: Any) -> tuple[Tensor, ...]:
        assert arguments[-4].shape == grad.shape
        assert arguments[-3].shape == grad.shape[:3]
        return tuple(given[:3])

    grad, given = tensors()
    monkeypatch.setattr(triton_gradient, "launch", launched)
    spec = replace(case("causal").spec, score=ex.s, normalizer=Pointwise())
    assert gradients(spec, grad, None, given[:3], (), [True] * 3, print, Options(first_use_check=False)) is not None


def test_the_forward_is_asked_for_its_lse_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, q = case("causal").spec, torch.empty(1)
    monkeypatch.setattr(triton_gradient, "runs_on", lambda device, options: options.kernel != "reference")
    assert recorded_text(spec.text, q, Options()) == replace(spec, returns=("lse",)).text
    assert recorded_text(spec.text, q.double(), Options()) == spec.text
    assert recorded_text(spec.text, q, Options(kernel="reference")) == spec.text
