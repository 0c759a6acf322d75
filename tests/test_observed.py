"""Attention with side outputs: all of them against fp64, under every policy, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import attnopt
from attnopt import expr as ex
from attnopt.errors import OptionError, ShapeError, SpecError
from attnopt.observed import Attention, attention
from attnopt.options import Options
from attnopt.runtime.dispatch import use
from attnopt.runtime.pairs import defined
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Pointwise, Select
from tests.runtime.cases import CAUSAL, PLAIN, inputs, padded

ALL = ("lse", "entropy", "column_mass", "weights")


@pytest.fixture(autouse=True)
def _reference_only() -> object:
    with use(Options(kernel="reference")) as dispatcher:
        yield dispatcher


def test_it_is_public() -> None:
    assert attnopt.attention is attention


@pytest.mark.parametrize("policy", list(EmptyRow))
def test_all_at_once(policy: EmptyRow) -> None:
    spec = padded(policy, sink=policy is EmptyRow.ZERO)
    q, k, v = inputs(spec)
    pad = [torch.tensor([[True] * 4 + [False] * 3, [False] * 7]), *[torch.randn(4)] * (policy is EmptyRow.ZERO)]
    found = attention(spec, q, k, v, pad, returns=ALL)
    wide = [t.double() for t in (q, k, v)]
    out, rows = reference(replace(spec, returns=("lse", "entropy")), *wide, pad)
    assert_close(found.out.double(), out, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert_close(torch.stack([found.lse, found.entropy], -1).double(), rows, equal_nan=True, atol=1e-5, rtol=1e-5)  # type: ignore[list-item]
    for name, made in (("column_mass", found.column_mass), ("weights", found.weights)):
        want = defined(spec, *wide[:2], pad, (), name)
        assert made is not None
        assert_close(made.double(), want, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_nothing_is_made_that_was_not_asked() -> None:
    q, k, v = inputs(PLAIN)
    assert attention(PLAIN, q, k, v)[1:] == (None,) * 4
    only = attention(replace(PLAIN, returns=("entropy",)), q, k, v)
    assert only.entropy is not None
    assert (only.lse, only.column_mass, only.weights) == (None, None, None)
    assert Attention._fields == ("out", *ALL)
    single = attention(PLAIN, q, k, v, returns="column_mass")
    assert_close(single.column_mass.sum(-1), torch.full((2, 4), 5.0))  # type: ignore[union-attr]


def test_other_normalisers_and_choices() -> None:
    relu = AttentionSpec(PLAIN.heads, score=ex.Maximum(ex.s, 0), normalizer=Pointwise(ex.n_k))
    mixed = AttentionSpec(PLAIN.heads, score=ex.s / 3, normalizer=Mixed(ex.k > ex.q - 2, 3), keep=ex.k <= ex.q)
    few = replace(CAUSAL, select=Select("topk", (ex.sp.Integer(1),), block=2, tile=2, own=ex.q, first=0))
    for spec in (relu, mixed, few):
        q, k, v = (t.abs() for t in inputs(spec, n_q=7))
        found = attention(spec, q, k, v, returns=("column_mass", "weights"))
        assert_close(found.column_mass, found.weights.sum(-2))  # type: ignore[union-attr]
        if spec is few:
            assert int((found.weights[0, 0, -1] != 0).sum()) <= 2  # type: ignore[index]


def test_gradients_of_everything_together() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(CAUSAL, dtype=torch.float64))
    found = attention(CAUSAL, q, k, v, returns=ALL)
    total = sum((x.double() ** 2).sum() for x in found)  # type: ignore[union-attr]
    grads = torch.autograd.grad(total, [q, k, v])
    out, rows = reference(replace(CAUSAL, returns=("lse", "entropy")), q, k, v)
    p = defined(CAUSAL, q, k, (), (), "weights")
    by_hand = (out**2).sum() + (rows**2).sum() + (p.sum(-2) ** 2).sum() + (p**2).sum()
    # Side outputs are rounded to fp32.
    assert_close(grads, torch.autograd.grad(by_hand, [q, k, v]), atol=1e-5, rtol=1e-5)


def test_what_there_is_not_is_refused_in_one_sentence() -> None:
    q, k, v = inputs(PLAIN)
    with pytest.raises(SpecError, match="unknown side outputs"):
        attention(PLAIN, q, k, v, returns=("attention_map",))
    with pytest.raises(SpecError, match="only the weights of a softmax"):
        attention(replace(PLAIN, normalizer=Pointwise()), q, k, v, returns=("entropy",))
    with pytest.raises(OptionError, match="AttentionSpec"):
        attention(PLAIN.text, q, k, v)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="several terms"):
        attention(replace(PLAIN, merge=(PLAIN,)), q, k, v, returns=("lse",))
    from attnopt.runtime.op import attention as operator

    with pytest.raises(SpecError, match=r"call attnopt\.attention"):
        operator(replace(PLAIN, returns=("weights",)), q, k, v)


@pytest.mark.parametrize("returns", [None, 3, [["lse"]], torch.ones(2)], ids=["none", "number", "list", "tensor"])
def test_returns_are_names(returns: object) -> None:
    with pytest.raises(OptionError, match="names of side outputs"):
        attention(PLAIN, *inputs(PLAIN), returns=returns)  # type: ignore[arg-type]


def test_what_the_result_has_no_place_for_is_refused() -> None:
    q, k, v = inputs(PLAIN)
    with pytest.raises(SpecError, match="'max'; there are lse, entropy"):
        attention(PLAIN, q, k, v, returns=("lse", "max"))
    assert attention(PLAIN, q, k, v, returns=(name for name in ("lse",))).lse is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "given", "message"),
    [
        (0, None, "q must be a tensor; it is a NoneType"),
        (1, [1.0], "k must be a tensor; it is a list"),
        (2, torch.ones(2, 2, 7, 6).to_sparse(), "v must be a dense tensor"),
        (3, None, "captures are a sequence of tensors; they are a NoneType"),
        (3, [None], "capture 0 must be a tensor"),
    ],
)
def test_what_is_no_tensor_is_refused(place: int, given: object, message: str) -> None:
    arguments: list[object] = [*inputs(PLAIN), ()]
    arguments[place] = given
    with pytest.raises(ShapeError, match=message):
        attention(PLAIN, *arguments)  # type: ignore[arg-type]
