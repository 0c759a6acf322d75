"""Which gradients of linear attention have kernels, and that those of the CPU are run, checked and replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.mixed_form import mixed_form
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import dispatch, linear_gradient, linear_sums, op
from attnopt.runtime.gradient import expected
from attnopt.runtime.gradient import gradients as torch_gradients
from attnopt.runtime.linear_gradient import applies, gradients
from attnopt.spec import AttentionSpec, Capture, Heads
from tests.runtime import test_linear as plain
from tests.runtime import test_mixed as beside


def test_where_the_forward_has_a_linear_part() -> None:
    for name, inputs, length, wanted in (
        ("causal", plain, 700, True),
        ("causal", plain, 20, False),
        ("causal", beside, 20, True),
    ):
        qkv, _ = inputs.inputs(inputs.SPECS[name], length, length)
        assert applies(inputs.SPECS[name], qkv[0], qkv[1]) is wanted


@pytest.mark.parametrize("change", ["double", "nothing", "empty"])
def test_no_gradient_and_no_word_where_there_is_nothing_to_do(change: str) -> None:
    given, heard = plain.SPECS["causal"], []
    dtype = torch.float64 if change == "double" else torch.float32
    qkv, _ = plain.inputs(given, 0 if change == "empty" else 20, 20, dtype)
    grad = torch.zeros(2, 4, qkv[0].shape[2], 6)
    needs: Any = [change != "nothing"] * 3
    assert gradients(given, grad, qkv, (), needs, heard.append, Options()) is None
    assert not heard


def _expected(given: Any, pull: Tensor, tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return expected(given, pull, None, tensors, (), needs, torch.float64)


@pytest.mark.parametrize(
    ("name", "part"), [("causal", plain), ("padded", plain), ("causal", beside), ("padded", beside)]
)
def test_the_operator_runs_them(name: str, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = part.SPECS[name]
    qkv, captures = part.inputs(given, 300, 300, torch.float32)
    if part is beside:
        given = AttentionSpec.parse(replace(given, heads=Heads(4, 2, 2, 14, 5)).text)
        qkv[2] = qkv[2][:, :2].contiguous()
    leaves = [x.requires_grad_() for x in qkv]

    def refuse(*args: Any) -> None:
        raise AssertionError("torch's operators ran")

    monkeypatch.setattr(op, "gradients", refuse)
    with dispatch.use(Options()):
        out, _ = op.attention(given, *leaves, captures)
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad(out, leaves, pull)
    needs = [True] * 3 + [False] * len(captures)
    for x, g in zip(found, _expected(given, pull, [*leaves, *captures], needs), strict=True):
        assert bool(x.isfinite().all())
        torch.testing.assert_close(x.double(), g, rtol=1e-3, atol=1e-5 * float(g.abs().max()))


def test_a_learned_gate_has_its_gradient() -> None:
    gate = (Capture("gate", "float", (4, None)),)
    given = plain.spec(keep=plain.CAUSAL, divide=ex.t + 1, captures=gate, gate=ex.load("gate", ex.h, ex.q))
    qkv, _ = plain.inputs(plain.SPECS["causal"], 90, 90, torch.float32)
    tensors = [*qkv, torch.rand(4, 90, generator=torch.Generator().manual_seed(3))]
    pull = torch.randn((2, 4, 90, 6), generator=torch.Generator().manual_seed(4))
    found = gradients(given, pull, tensors, (), [True] * 4, pytest.fail, Options())
    assert found is not None
    for x, g in zip(found, _expected(given, pull, tensors, [True] * 4), strict=True):
        torch.testing.assert_close(x.double(), g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


@pytest.mark.parametrize("how", ["wrong", "failing"])
def test_kernels_that_are_wrong_or_fail_are_replaced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = plain.spec(ex.s / 11, plain.CAUSAL)
    qkv, _ = plain.inputs(given, 300, 300, torch.float32)
    pull, heard, launch = torch.ones(2, 4, 300, 6), [], linear_sums.launch

    def changed(*args: Any, **more: Any) -> None:
        if how == "failing":
            raise CompileError("the kernel ran out of memory")
        launch(*args, **more)
        args[3].mul_(1.01)

    monkeypatch.setattr(linear_gradient, "_KNOWN", {})
    monkeypatch.setattr(linear_sums, "launch", changed)
    for _ in range(2):
        assert gradients(given, pull, qkv, (), [True] * 3, heard.append, Options()) is None
    said = "disagrees with the reference" if how == "wrong" else "out of memory"
    assert heard
    assert all(said in x and "Torch's operators compute them" in x for x in heard)
    torch.testing.assert_close(
        torch_gradients(given, pull, None, qkv, (), [True] * 3), _expected(given, pull, qkv, [True] * 3),
        rtol=1e-4, atol=1e-4, check_dtype=False,
    )  # fmt: skip


def test_where_they_are_enabled() -> None:
    q = torch.zeros(1, 1, 1, 1)
    assert [linear_gradient.enabled(q, Options.make(x)) for x in ({}, {"kernel": "cpp"})] == [True, True]
    assert not any(linear_gradient.enabled(q, Options.make(x)) for x in ({"disable": True}, {"kernel": "reference"}))


def test_where_torch_is_the_better_way() -> None:
    q, parts = torch.zeros(1, 4, 100, 14), mixed_form(beside.SPECS["causal"])
    assert parts is not None
    same = replace(parts, near=replace(parts.near, heads=Heads(4, 2, 2, 6, 5)))
    said = [linear_gradient._better(x, q, q, needs) for x in (None, parts, same) for needs in ([True] * 3, [True] * 4)]
    assert [bool(x) for x in said] == [False, False, True, True, False, True]
    assert "fewer than 64" in linear_gradient._better(None, q[:, :, :63], q, [True] * 3)
