"""Gradients inside an operator, below the autograd keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from attnopt.runtime.gradient import _sdpa_pays, gradients, telling
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Heads
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, inputs

F64 = torch.float64


def test_below_autograd_and_under_autocast_they_are_still_recorded() -> None:
    q, k, v = inputs(BIASED, dtype=F64)
    bias = torch.randn(4, 5, 7, dtype=F64)
    weight = torch.randn(2, 4, 5, 6, dtype=F64)
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(BIASED, weight, None, (q, k, v, bias), (), [True] * 4)
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    want = torch.autograd.grad((reference(BIASED, q, k, v, [bias])[0] * weight).sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("needs", [(True, False, False), (False, False, True), (False, False, False)])
def test_only_what_is_needed(needs: tuple[bool, ...]) -> None:
    q, k, v = inputs(PLAIN)
    assert len(gradients(PLAIN, torch.ones(2, 4, 5, 6), None, (q, k, v), (), needs)) == sum(needs)


def test_without_keys_gradients_are_zero() -> None:
    q, k, v = inputs(PLAIN, n_k=0)
    found = gradients(PLAIN, torch.ones(2, 4, 5, 6), None, (q, k, v), (), [False, False, True])
    assert found[0].shape == v.shape


def _square(spec: AttentionSpec) -> AttentionSpec:
    return replace(spec, heads=Heads(4, 2, 2, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [_square(PLAIN), _square(CAUSAL)], ids=["plain", "causal"])
def test_the_fused_gradient_is_that_of_the_reference(
    spec: AttentionSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(spec, n_q=19, n_k=37, dtype=dtype)
    weight = torch.randn(2, 4, 19, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        fused = gradients(spec, weight, None, tensors, (), [True] * 3)
        monkeypatch.setattr("attnopt.runtime.gradient._sdpa_pays", lambda *_: False)
        eager = gradients(spec, weight, None, tensors, (), [True] * 3)
        golden = gradients(spec, weight.double(), None, [t.double() for t in tensors], (), [True] * 3)
    for mine, theirs, exact in zip(fused, eager, golden, strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        verdict = compare(exact, theirs, mine, gradients=True)
        assert verdict.ok, verdict


def test_what_torch_has_no_fused_gradient_of_goes_through_the_reference() -> None:
    assert not _sdpa_pays(BIASED, inputs(BIASED))
    assert not _sdpa_pays(PLAIN, inputs(PLAIN))  # widths differ
    assert not _sdpa_pays(_square(PLAIN), inputs(_square(PLAIN), dtype=F64))
    assert not _sdpa_pays(_square(PLAIN), inputs(_square(PLAIN), n_k=0))


def test_kernels_are_judged_by_gradients_of_every_row() -> None:
    whole = torch.ones(2, 4, 5, 6)
    assert telling(whole) is whole
    assert telling(whole[..., 0]).shape == (2, 4, 5)
    for value in (0.0, torch.inf, torch.nan):
        for shape in (whole.shape, whole.shape[:3]):
            poor = torch.ones(shape)
            poor[1, 2, 3] = value
            drawn = telling(poor)
            assert drawn.shape == shape
            assert bool(drawn.isfinite().all())
            assert drawn.count_nonzero() == drawn.numel()
            assert torch.equal(drawn, telling(poor))
