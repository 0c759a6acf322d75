"""Side outputs of rows in eager PyTorch, against their formulas in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.runtime.reference import reference
from attnopt.runtime.statistics import entropy_of_nothing, folded, named
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Softmax
from tests.runtime.cases import inputs, padded

F64 = torch.float64
ALL = ("lse", "entropy", "max", "log_sum")


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p).sum(-1)


@pytest.mark.parametrize("policy", list(EmptyRow))
def test_rows_without_keys_have_the_entropy_of_their_policy(policy: EmptyRow) -> None:
    spec = replace(padded(policy), returns=ALL)
    q, k, v = inputs(spec, dtype=F64)
    pad = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    rows = named(ALL, reference(spec, q, k, v, [pad])[1])
    p = torch.einsum("bhqd,bhkd->bhqk", q, k).div(3)[:1, ..., :4].softmax(-1)
    assert_close(rows["entropy"][:1], _entropy(p))
    want = {EmptyRow.ZERO: 0.0, EmptyRow.NAN: math.nan, EmptyRow.UNIFORM: math.log(7)}[policy]
    assert_close(rows["entropy"][1], torch.full((4, 5), want, dtype=F64), equal_nan=True)
    assert entropy_of_nothing(policy, 7) == want or math.isnan(want)
    assert_close((rows["max"] + rows["log_sum"]), rows["lse"])


def test_a_sink_is_part_of_the_distribution() -> None:
    spec = replace(padded(EmptyRow.NAN, sink=True), returns=("entropy",))
    q, k, v = inputs(spec, dtype=F64)
    pad, sink = torch.tensor([[True] * 7, [False] * 7]), torch.randn(4, dtype=F64)
    found = reference(spec, q, k, v, [pad, sink])[1]
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k)[:1] / 3
    joined = torch.cat([logits, sink.view(1, 4, 1, 1).expand(1, 4, 5, 1)], -1)
    assert_close(found[:1], _entropy(joined.softmax(-1)))
    assert bool((found[1] == 0).all())  # a sink that has all of the weight


def test_logits_of_thousands_keep_the_digits_of_entropy() -> None:
    spec = AttentionSpec(Heads(1, 1, 1, 4, 4), score=ex.s + 100000, returns=ALL)
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 6, 6))
    plain = replace(spec, score=ex.s)
    shifted, near = (named(ALL, reference(x, q, k, v)[1]) for x in (spec, plain))
    # An fp32 logit of 1e5 has eight thousandths.
    for name in ("entropy", "log_sum"):
        assert_close(shifted[name], near[name], atol=0.05, rtol=0.0)


def test_entropy_has_the_gradient_of_its_formula() -> None:
    spec = AttentionSpec(Heads(2, 2, 2, 4, 4), keep=ex.k <= ex.q, returns=("entropy",))
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=F64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda q, k: reference(spec, q, k, v)[1], (q, k))


def test_rows_left_out_and_no_keys_at_all() -> None:
    gain = Capture("gain", "float", (None,))
    spec = AttentionSpec(Heads(2, 2, 2, 4, 4), rows=ex.sp.Ne(ex.load("gain", ex.q), 0), captures=(gain,), returns=ALL)
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    rows = reference(spec, q, k, v, [torch.tensor([1.0, 0.0, 1.0])])[1]
    assert rows[0, 0, 1].tolist() == [-math.inf, 0.0, 0.0, math.inf]
    assert bool(rows[:, :, ::2].isfinite().all())
    sink = AttentionSpec(Heads(2, 2, 2, 4, 4), normalizer=Softmax(ex.h + 1), returns=ALL)
    none = reference(sink, q, k[:, :, :0], v[:, :, :0])[1]
    assert none[0, 1, 0].tolist() == [2.0, 0.0, 2.0, 0.0]


def test_gradients_of_rows_that_an_lse_has_too() -> None:
    found, grads = torch.randn(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    grads[..., 1] = 0.0
    plain, lse, grad = folded(ALL, found, grads)
    assert plain
    assert torch.equal(lse, found[..., 0])  # type: ignore[arg-type]
    assert torch.equal(grad, torch.full((1, 2, 3), 2.0))  # type: ignore[arg-type]
    plain, lse, _ = folded(("max", "log_sum"), found[..., 2:], None)
    assert plain
    assert torch.equal(lse, found[..., 2] + found[..., 3])  # type: ignore[arg-type]
    assert not folded(ALL, found, torch.ones(1, 2, 3, 4))[0]
    assert folded((), None, None) == (True, None, None)
