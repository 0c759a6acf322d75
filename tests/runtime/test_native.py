"""The layout class of inputs, and the places at which a kernel is checked."""

from __future__ import annotations

import torch

from attnopt.codegen.base import CaptureLayout
from attnopt.codegen.cpp import k_axes
from attnopt.runtime.native import _spread, check_rows, layout_of
from attnopt.runtime.reference import reference
from tests.runtime.cases import BIASED, inputs


def test_layout_classes() -> None:
    q, _, _ = inputs(BIASED)
    bias = torch.randn(4, 5, 7)
    axes = k_axes(BIASED)
    strides = [layout_of(axes, q, [t]).captures[0] for t in (bias, bias[..., :1].expand(4, 5, 7), bias.mT)]
    assert strides == [CaptureLayout("float32", s) for s in (1, 0, None)]
    assert layout_of(axes, q.bfloat16(), [bias.half()]).captures == (CaptureLayout("float16", 1),)


def test_samples_hold_both_ends() -> None:
    assert _spread(1, 8).tolist() == [0]
    assert _spread(3, 8).tolist() == [0, 1, 2]
    assert _spread(2**25 + 1, 3).tolist() == [0, 2**24, 2**25]


def test_the_check_sees_a_wrong_lse() -> None:
    q, k, v = inputs(BIASED)
    bias = torch.randn(4, 5, 7)
    out, lse = reference(BIASED, q, k, v, [bias])
    assert check_rows(BIASED, (q, k, v), [bias], [], out, lse).ok
    assert not check_rows(BIASED, (q, k, v), [bias], [], out, lse / 0.6931).ok
    assert not check_rows(BIASED, (q, k, v), [bias], [], out.roll(1, 1), lse).ok
