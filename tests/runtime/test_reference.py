"""The reference against attention written out by hand in fp64."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.runtime.reference import Sample, reference
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Softmax
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, dense, inputs, padded

F64 = torch.float64


def test_plain_grouped_heads_match_the_dense_definition() -> None:
    q, k, v = inputs(PLAIN, dtype=F64)
    out, lse = reference(PLAIN, q, k, v)
    want, want_lse = dense(PLAIN, q, k, v, 1 / 3, 0.0, True)
    assert_close(out, want)
    assert_close(lse, want_lse)


def test_bias_and_causal_match_the_dense_definition() -> None:
    q, k, v = inputs(BIASED, dtype=F64)
    bias = torch.randn(4, 5, 7, dtype=F64)
    keep = torch.arange(5)[:, None] >= torch.arange(7)
    out, lse = reference(BIASED, q, k, v, [bias])
    want, want_lse = dense(BIASED, q, k, v, 1 / 3, bias, keep)
    assert_close(out, want)
    assert_close(lse, want_lse)


@pytest.mark.parametrize("policy", list(EmptyRow))
def test_empty_rows_follow_their_policy(policy: EmptyRow) -> None:
    spec = padded(policy)
    q, k, v = inputs(spec, dtype=F64)
    pad = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    out, lse = reference(spec, q, k, v, [pad])
    want, _ = dense(spec, q, k, v, 1 / 3, 0.0, pad[:, None, None])
    assert_close(out[0], want[0])
    filler = {
        EmptyRow.ZERO: 0.0 * v[1, :, :1],
        EmptyRow.NAN: torch.nan * v[1, :, :1],
        EmptyRow.UNIFORM: v[1].mean(-2, True),
    }
    assert_close(out[1], filler[policy].expand(4, 5, 6), equal_nan=True)
    assert bool((lse[1] == -torch.inf).all())
    assert bool(lse[0].isfinite().all())


def test_a_finite_sink_takes_the_weight_of_an_empty_row() -> None:
    spec = padded(EmptyRow.NAN, sink=True)
    q, k, v = inputs(spec, dtype=F64)
    pad, sink = torch.tensor([[True] * 7, [False] * 7]), torch.randn(4, dtype=F64)
    out, lse = reference(spec, q, k, v, [pad, sink])
    logits = torch.cat([torch.einsum("bhqd,bhkd->bhqk", q, k)[0] / 3, sink.view(4, 1, 1).expand(4, 5, 1)], -1)
    assert_close(out[0], logits.softmax(-1)[..., :-1] @ v[0])
    assert_close(lse[0], logits.logsumexp(-1))
    assert bool((out[1] == 0).all())
    assert_close(lse[1], sink[:, None].expand(4, 5))


def test_gate_soft_cap_scalars_and_head_table() -> None:
    offset = ex.scalar("offset")
    spec = AttentionSpec(
        Heads(3, 2, 2, 8, 6, (1, 0, 1), (0, 0, 1)),
        score=5 * sp.tanh(ex.s / 15),
        keep=sp.Ge(ex.q + offset - ex.k, 0),
        gate=ex.load("gain", ex.h) * (ex.q + 1),
        captures=(Capture("gain", "float", (3,)),),
        scalars=("offset",),
    )
    q, k, v = inputs(spec, dtype=F64)
    gain = torch.randn(3, dtype=F64)
    out, _ = reference(spec, q, k, v, [gain], [2])
    logits = 5 * torch.tanh(torch.einsum("bhqd,bhkd->bhqk", q, k[:, [1, 0, 1]]) / 15)
    logits = logits.masked_fill(torch.arange(5)[:, None] + 2 < torch.arange(7), -torch.inf)
    want = logits.softmax(-1) @ v[:, [0, 0, 1]] * gain[:, None, None] * torch.arange(1, 6)[:, None]
    assert_close(out, want)


def test_a_sample_equals_its_part_of_the_whole() -> None:
    spec = padded(EmptyRow.UNIFORM)
    q, k, v = inputs(spec, batch=3, dtype=F64)
    pad = torch.rand(3, 7) > 0.4
    whole, lse = reference(spec, q, k, v, [pad])
    batch, heads, rows = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0, 2, 4])
    out, part = reference(spec, q, k, v, [pad], sample=Sample(batch, heads, rows))
    assert_close(out, whole[batch][:, heads][:, :, rows])
    assert_close(part, lse[batch][:, heads][:, :, rows])
    assert_close(reference(spec, q, k, v, [pad], rows=rows)[0], whole[:, :, rows])


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_sizes(batch: int, n_q: int, n_k: int) -> None:
    q, k, v = inputs(PLAIN, batch, n_q, n_k)
    out, lse = reference(PLAIN, q, k, v)
    assert out.shape == (batch, 4, n_q, 6)
    assert lse.shape == (batch, 4, n_q)
    assert bool((out == 0).all())


def test_masked_positions_do_not_poison_gradients() -> None:
    spec = padded(EmptyRow.ZERO)
    q, k, v = (t.requires_grad_() for t in inputs(spec, dtype=F64))
    pad = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    reference(spec, q, k, v, [pad])[0].sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (q, k, v))
    assert bool((v.grad[1] == 0).all())  # type: ignore[index]


def test_gradients_pass_gradcheck_with_captures() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(BIASED, 1, 3, 4, F64))
    bias = torch.randn(4, 3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v, bias: reference(BIASED, q, k, v, [bias]), (q, k, v, bias))


def test_dropout_repeats_with_its_seed() -> None:
    spec = AttentionSpec(Heads(4, 4, 4, 8, 6), dropout=0.5, normalizer=Softmax())
    q, k, v = inputs(spec)
    first, again, other = (reference(spec, q, k, v, (), [seed])[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_precision_is_computed_in_fp32() -> None:
    q, k, v = inputs(CAUSAL, dtype=torch.bfloat16)
    out, _ = reference(CAUSAL, q, k, v)
    exact, _ = reference(CAUSAL, q.double(), k.double(), v.double())
    assert out.dtype == torch.bfloat16
    # One rounding of the result: half an ulp, an ulp being eps relative to the power of two below.
    assert float(((out.double() - exact).abs() / exact.abs()).max()) <= 0.51 * torch.finfo(torch.bfloat16).eps
