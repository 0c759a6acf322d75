"""The layout class of inputs, and the places at which a kernel is checked."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnopt import expr as ex
from attnopt.codegen.base import CaptureLayout
from attnopt.codegen.cpp import k_axes
from attnopt.runtime.native import _spread, check_rows, layout_of
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec
from tests.runtime.cases import BIASED, PLAIN, inputs


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


def _in_sequence(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, off: float) -> torch.Tensor:
    """The attention with every score summed one product at a time in fp32, all scores then multiplied by `1 + off`."""
    score = torch.zeros(*q.shape[:3], k.shape[2])
    for d in range(q.shape[3]):
        score += q[..., d, None] * k[:, :, None, :, d]
    score = score * float(spec.score.coeff(ex.s)) * (1.0 + off)
    return score.softmax(-1) @ v


def test_the_check_allows_another_order_of_a_long_sum() -> None:
    """Eager sums a thousand products in short runs, a kernel in one: at peaked rows that is more than 1.2 times."""
    heads = replace(PLAIN.heads, d_qk=1024, d_v=8, q=2, k=2, v=2, k_map=(0, 1), v_map=(0, 1))
    spec = replace(PLAIN, heads=heads, score=ex.s / 32)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, n, d, generator=generator) for n, d in ((61, 1024), (301, 1024), (301, 8)))
    golden, _ = reference(spec, q.double(), 12 * k.double(), v.double())
    eager, _ = reference(spec, q, 12 * k, v)
    result = _in_sequence(spec, q, 12 * k, v, 0.0)
    assert not compare(golden, eager, result).ok
    assert check_rows(spec, (q, 12 * k, v), [], [], result, None).ok
    assert not check_rows(spec, (q, 12 * k, v), [], [], _in_sequence(spec, q, 12 * k, v, 1e-4), None).ok
