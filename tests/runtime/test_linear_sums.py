"""The gradients of a linear attention by C++ kernels are those of the reference, at ragged lengths and in every dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.options import Options
from attnopt.runtime import linear_sums
from attnopt.runtime.cpp_gradient import objection
from attnopt.runtime.gradient import expected
from attnopt.runtime.linear_gradient import Gradients
from attnopt.runtime.linear_sums import NativeSums, build_sums
from attnopt.spec import AttentionSpec, Heads
from tests.runtime import test_linear as plain
from tests.runtime.test_linear_native import SPECS

SIZES = ((150, 150), (7, 150), (150, 7), (65, 64), (1, 1), (64, 129), (300, 300), (1, 70), (70, 1))


def _refuse(message: str) -> None:
    raise AssertionError(message)


def _built(given: AttentionSpec) -> Gradients:
    form = linear_form(given)
    assert form is not None
    backend = build_sums(given, form, Options.make(), _refuse)
    assert backend is not None
    return Gradients(given, backend, None)


def _given(given: AttentionSpec, sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[bool]]:
    qkv, captures = plain.inputs(given, *sizes, dtype)
    captures = [x.float() if x.is_floating_point() else x for x in captures]
    grad = torch.randn((*qkv[0].shape[:3], 6), generator=torch.Generator().manual_seed(5)).to(dtype)
    return grad, [*qkv, *captures], [x.is_floating_point() for x in (*qkv, *captures)]


CASES = [
    *((name, torch.float32) for name in SPECS),
    ("padded", torch.bfloat16),
    ("decay", torch.float16),
    ("line", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_gradients_are_as_right_as_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """A row with one key, divided by its sum, has no gradient, and none by its line: there roundings are compared."""
    kernels, single = _built(SPECS[name]), name in ("causal", "divided", "bottom_right", "line")
    for sizes in SIZES:
        grad, tensors, needs = _given(SPECS[name], sizes, dtype)
        found = kernels.run(grad, tensors, (), needs)
        golden = expected(SPECS[name], grad, None, tensors, (), needs, torch.float64)
        for x, g in zip(found, golden, strict=True):
            assert torch.equal(x.isfinite(), g.isfinite())
            if 1 in sizes and single:
                usable = g.isfinite()
                assert bool(((x.double() - g)[usable].abs() <= 1e-5 * (1 + g[usable].abs())).all()), sizes
        if not (1 in sizes and single):
            assert not objection(SPECS[name], grad, None, tensors, (), needs, dict(enumerate(found))), sizes


@pytest.mark.parametrize("maps", [((1, 0, 0, 1), (2, 1, 0, 2)), ((0, 0, 0, 0), (0, 1, 2, 3)), ((1, 1, 1, 1), ())])
def test_any_map_of_heads(maps: tuple[Any, Any]) -> None:
    count_k, count_v = max(maps[0]) + 1, max(maps[1], default=3) + 1
    heads = Heads(4, count_k, count_v, 8, 6, *maps)
    given = AttentionSpec.parse(replace(SPECS["causal"], heads=heads).text)
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 90, 8), (2, count_k, 80, 8), (2, count_v, 80, 6), (2, 4, 90, 6))
    q, k, v, grad = (torch.rand(shape, generator=draw) for shape in shapes)
    found = _built(given).run(grad, [q, k, v], (), [True] * 3)
    for x, g in zip(found, expected(given, grad, None, [q, k, v], (), [True] * 3, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), g, rtol=1e-5, atol=1e-5 * float(g.abs().max()))


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, ran = _built(SPECS["causal"]), []
    grad, tensors, _ = _given(SPECS["causal"], (70, 70), torch.float32)
    whole = kernels.run(grad, tensors, (), [True] * 3)
    launch = linear_sums.launch
    monkeypatch.setattr(linear_sums, "launch", lambda *a, **k: (ran.append(a), launch(*a, **k)))
    for place in range(3):
        ran.clear()
        found = kernels.run(grad, tensors, (), [place == i for i in range(3)])
        assert torch.equal(found[0], whole[place])
        assert len(ran) == 2


def test_strides_threads_and_what_memory_held_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _built(SPECS["padded"])
    grad, tensors, needs = _given(SPECS["padded"], (130, 110), torch.float32)
    golden = kernels.run(grad, tensors, (), needs)
    assert all(bool(x.isfinite().all()) for x in golden)
    for move in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        found = kernels.run(move(grad), [*map(move, tensors[:3]), *tensors[3:]], (), needs)
        torch.testing.assert_close(found, golden, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    made = linear_sums._empty
    monkeypatch.setattr(linear_sums, "_empty", lambda *a: made(*a).fill_(torch.nan))
    found = kernels.run(grad, tensors, (), needs)
    assert all(torch.equal(x, y) for x, y in zip(found, golden, strict=True))


def test_broadcast_inputs() -> None:
    """Of a gradient of ones all rows are one number, of a batch made by `expand` all entries."""
    kernels, given = _built(SPECS["bottom_right"]), SPECS["bottom_right"]
    _, tensors, needs = _given(given, (40, 90), torch.float32)
    grad, wide = torch.ones(()).expand(2, 4, 40, 6), [t[:1].expand(2, -1, -1, -1) for t in tensors]
    found = kernels.run(grad, wide, (), needs)
    golden = kernels.run(grad.contiguous(), [t.contiguous() for t in wide], (), needs)
    torch.testing.assert_close(found, golden, rtol=1e-5, atol=1e-6)


def test_values_far_from_zero_keep_their_digits() -> None:
    """Values are taken from one amid them: of gradients divided by sums of weights, large parts would cancel."""
    given = SPECS["divided"]
    grad, tensors, needs = _given(given, (200, 200), torch.float32)
    tensors[2] = tensors[2] + 64.0
    found = _built(given).run(grad, tensors, (), needs)
    assert not objection(given, grad, None, tensors, (), needs, dict(enumerate(found)))


def test_an_empty_batch() -> None:
    kernels = _built(SPECS["causal"])
    found = kernels.run(
        torch.ones(0, 4, 5, 6), [torch.ones(0, h, 5, d) for h, d in ((4, 8), (2, 8), (4, 6))], (), [True] * 3
    )
    assert [x.shape for x in found] == [(0, 4, 5, 8), (0, 2, 5, 8), (0, 4, 5, 6)]


def test_a_long_sequence_loses_no_digits() -> None:
    """States of later queries are summed in fp64: of 2^14 gradients of one the sum is exact."""
    heads = attnopt.spec.Heads(1, 1, 1, 1, 1)
    given = AttentionSpec.parse(replace(plain.spec(keep=plain.CAUSAL), heads=heads).text)
    length = 1 << 14
    q, k, v = (torch.ones(1, 1, length, 1) for _ in range(3))
    dq, dk, dv = _built(given).run(q * (1 + 1 / 1024), [q, k, v], (), [True] * 3)
    counted = torch.arange(1, length + 1, dtype=torch.float64) * (1 + 1 / 1024)
    for x, wanted in ((dq, counted), (dk, counted.flip(0)), (dv, counted.flip(0))):
        torch.testing.assert_close(x.flatten().double(), wanted, rtol=1.2e-7, atol=0)


def test_decay_far_from_its_keys_does_not_overflow() -> None:
    """Queries that are many more than keys, or fewer: `exp(rate (n_q - n_k))` alone would leave the range of fp32."""
    given = plain.spec(ex.s * plain.DECAY, plain.CAUSAL, captures=plain.RATE)
    for sizes in ((900, 5), (5, 900)):
        grad, tensors, needs = _given(given, sizes, torch.float32)
        found = _built(given).run(grad, tensors, (), needs)
        for x, g in zip(found, expected(given, grad, None, tensors, (), needs, torch.float64), strict=True):
            torch.testing.assert_close(x.double(), g, rtol=1e-5, atol=1e-6 * float(g.abs().max()))


def test_without_a_compiler_there_are_none() -> None:
    form, heard = linear_form(SPECS["causal"]), []
    assert form is not None
    assert build_sums(SPECS["causal"], form, Options(cxx="/nowhere/g++"), heard.append) is None
    assert len(heard) == 1
    assert NativeSums.name == "cpp linear"
