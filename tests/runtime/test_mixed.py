"""Mixed attention: the reference is its formula, both linear forms are the reference, gradients included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

import attnopt
from attnopt import expr as ex
from attnopt.analysis.mixed_form import mixed_form
from attnopt.runtime import dispatch, mixed
from attnopt.runtime.gradient import gradients
from attnopt.runtime.op import attention
from attnopt.runtime.reference import Sample, reference
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Mixed

GAP = ex.q - ex.k
PLACE = ex.q + ex.n_k - ex.n_q
PAD = (Capture("pad", "bool", (None, None)),)
KEPT = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)
BASE = AttentionSpec(Heads(4, 2, 4, 14, 5), ex.s / 2, GAP >= 0, Mixed(GAP < 10, 8), empty_row=EmptyRow.ZERO)
SPECS = {
    name: AttentionSpec.parse(spec.text)
    for name, spec in {
        "causal": BASE,
        "wide": replace(BASE, normalizer=Mixed(GAP < 70, 8)),
        "bottom_right": replace(BASE, keep=ex.k <= PLACE, normalizer=Mixed(PLACE - ex.k < 10, 8)),
        "padded": replace(BASE, keep=sp.And(GAP >= 0, KEPT), captures=PAD, gate=sp.Rational(1, 2)),
    }.items()
}


def inputs(given: AttentionSpec, n_q: int, n_k: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
    """Six columns of scores, eight of features that are nowhere negative; the first keys of entry 1 are padding."""
    draw = torch.Generator().manual_seed(n_q + n_k)
    q, k, v = (
        torch.randn(2, h, n, d, generator=draw).double() for h, n, d in ((4, n_q, 14), (2, n_k, 14), (4, n_k, 5))
    )
    q[..., 6:], k[..., 6:] = q[..., 6:].exp(), k[..., 6:].exp()
    pad = torch.rand(2, n_k, generator=draw) > 0.3
    pad[1, : n_k // 2] = False
    return [x.to(dtype) for x in (q, k, v)], [pad] if given.captures else []


def by_hand(given: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Any, window: int, offset: int) -> Tensor:
    """`(sum near exp(s) v + sum far f v) / (the same without v)`."""
    k = k[:, [0, 0, 1, 1]]
    gap = torch.arange(q.shape[2])[:, None] + offset - torch.arange(k.shape[2])
    keep = (gap >= 0) & (captures[0][:, None, None] if captures else True)
    near = torch.exp(q[..., :6] @ k[..., :6].mT / 2) * (keep & (gap < window))
    far = (q[..., 6:] @ k[..., 6:].mT) * (keep & (gap >= window))
    total = (near + far).sum(-1, keepdim=True)
    return (near + far) @ v / total.masked_fill(total == 0, 1.0) * (0.5 if captures else 1.0)


@pytest.mark.parametrize("sizes", [(150, 150), (7, 150), (150, 7), (65, 64), (1, 1), (128, 100)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_reference_and_chunks_are_the_formula(name: str, sizes: tuple[int, int]) -> None:
    given, form = SPECS[name], mixed_form(SPECS[name])
    assert form is not None
    qkv, captures = inputs(given, *sizes)
    offset = sizes[1] - sizes[0] if name == "bottom_right" else 0
    golden = by_hand(given, *qkv, captures, form.window, offset)
    torch.testing.assert_close(reference(given, *qkv, captures)[0], golden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixed.chunked(given, form, *qkv, captures), golden, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_operator_runs_the_parts(name: str, dtype: torch.dtype) -> None:
    given = SPECS[name]
    qkv, captures = inputs(given, 150, 150, dtype)
    with dispatch.use(attnopt.Options()) as used:
        found, _ = attention(given, *qkv, captures)
        assert used.sites[given.text].used == "mixed"
    golden = reference(given, *(x.double() for x in qkv), captures)[0]
    eager = reference(given, *qkv, captures, compute=dtype)[0]
    verdict = compare(golden, eager, found)
    assert verdict.ok, verdict


def test_a_window_over_everything_is_the_softmax() -> None:
    given = replace(BASE, normalizer=Mixed(GAP < 1000, 8)).canonical()
    qkv, _ = inputs(given, 90, 90)
    q, k = (x[..., :6] for x in qkv[:2])
    scores = (q @ k[:, [0, 0, 1, 1]].mT / 2).masked_fill(~torch.ones(90, 90).tril().bool(), -torch.inf)
    golden = scores.softmax(-1) @ qkv[2]
    torch.testing.assert_close(reference(given, *qkv)[0], golden, rtol=1e-11, atol=1e-12)
    form = mixed_form(given)
    assert form is not None
    torch.testing.assert_close(mixed.chunked(given, form, *qkv), golden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(attention(given, *(x.float() for x in qkv))[0].double(), golden, rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow() -> None:
    given = SPECS["causal"]
    qkv, _ = inputs(given, 90, 90, torch.float32)
    qkv[0][..., :6] *= 100
    golden = reference(given, *(x.double() for x in qkv))[0]
    for found in (reference(given, *qkv)[0], attention(given, *qkv)[0]):
        torch.testing.assert_close(found.double(), golden, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_agree_with_those_of_the_reference(name: str) -> None:
    given = SPECS[name]
    qkv, captures = inputs(given, 90, 90)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = reference(given, *leaves, captures)[0]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    golden = torch.autograd.grad(out, leaves, weight)
    found = gradients(given, weight, None, [*qkv, *captures], [], [True, True, True, *(False for _ in captures)])
    for g, f in zip(golden, found, strict=True):
        torch.testing.assert_close(f, g, rtol=1e-9, atol=1e-10)


def test_an_empty_batch_and_no_keys() -> None:
    given = SPECS["causal"]
    for batch, n_q, n_k in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        q, k, v = torch.zeros(batch, 4, n_q, 14), torch.zeros(batch, 2, n_k, 14), torch.zeros(batch, 4, n_k, 5)
        out, _ = attention(given, q, k, v)
        assert torch.equal(out, torch.zeros(batch, 4, n_q, 5))


def test_one_entry_of_a_batch() -> None:
    given = SPECS["padded"]
    qkv, captures = inputs(given, 40, 40)
    form = mixed_form(given)
    assert form is not None
    sample = Sample(batch=torch.tensor([1]), whole_batch=2)
    found = mixed.chunked(given, form, *(x[1:] for x in qkv), captures, sample=sample)
    torch.testing.assert_close(found, reference(given, *qkv, captures)[0][1:], rtol=1e-11, atol=1e-12)
