"""The linear form computes what the reference computes, forward and backward, and only where it pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

import attnopt
from attnopt import expr as ex
from attnopt.analysis.linear_form import linear_form
from attnopt.runtime import dispatch, linear
from attnopt.runtime.gradient import gradients
from attnopt.runtime.op import attention
from attnopt.runtime.reference import Sample, reference
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec, Capture, Heads, Pointwise

HEADS = Heads(4, 2, 4, 8, 6)
CAUSAL, BOTTOM = sp.Ge(ex.q - ex.k, 0), sp.Ge(ex.q - ex.k + ex.n_k - ex.n_q, 0)
DECAY = sp.exp(-ex.load("rate", ex.h) * (ex.q - ex.k))
RATE = (Capture("rate", "float", (4,)),)
LINE = sp.exp(ex.load("line", ex.b, ex.h, ex.q) - ex.load("line", ex.b, ex.h, ex.k))
LINES = (Capture("line", "float", (None, 4, None)), Capture("column", "float", (4, None)))
PAD = (Capture("pad", "bool", (None, None)),)
KEPT = sp.Ne(ex.load("pad", ex.b, ex.k, integer=True), 0)


def spec(score: sp.Expr = ex.s, keep: Any = sp.true, divide: Any = sp.S.One, **more: Any) -> AttentionSpec:
    return AttentionSpec.parse(AttentionSpec(HEADS, score, keep, Pointwise(divide), **more).text)


SPECS = {
    "all": spec(ex.s / 3),
    "divided": spec(divide=ex.t + sp.Rational(1, 10**6)),
    "causal": spec(keep=CAUSAL, divide=ex.t),
    "bottom_right": spec(keep=BOTTOM, divide=ex.Maximum(sp.Abs(ex.t), sp.S.One)),
    "decay": spec(ex.s * DECAY, CAUSAL, captures=RATE, gate=ex.load("rate", ex.h)),
    "line": spec(ex.s * LINE * ex.load("column", ex.h, ex.k), CAUSAL, ex.t + 1, captures=LINES),
    "padded": spec(keep=sp.And(CAUSAL, KEPT), divide=ex.t + 1, captures=PAD),
}


def inputs(
    given: AttentionSpec, n_q: int, n_k: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys like feature maps make them, nowhere negative; and captures."""
    generator = torch.Generator().manual_seed(n_q + n_k)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = draw(2, 4, n_q, 8), draw(2, 2, n_k, 8), draw(2, 4, n_k, 6) - 0.5
    known = {"rate": draw(4) / 4, "pad": torch.rand(2, n_k, generator=generator) > 0.3}
    # Decays of each place, summed up: between them some that leave nothing, and some places that grow.
    known["line"] = (0.1 - draw(2, 4, max(n_q, n_k)) - 200 * (draw(max(n_q, n_k)) > 0.97)).cumsum(-1)
    known["column"] = draw(4, n_k)
    return [q, k, v], [known[c.name] for c in given.captures]


@pytest.mark.parametrize("sizes", [(150, 150), (7, 150), (150, 7), (65, 64), (1, 1), (128, 100)], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_it_computes_what_the_reference_does(name: str, sizes: tuple[int, int]) -> None:
    given = SPECS[name]
    form = linear_form(given)
    assert form is not None
    qkv, captures = inputs(given, *sizes)
    golden = reference(given, *qkv, captures)[0]
    found = linear.linear(given, form, *qkv, captures)
    assert torch.equal(golden.isfinite(), found.isfinite())
    usable = golden.isfinite()
    torch.testing.assert_close(found[usable], golden[usable], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
def test_in_fp32_it_is_as_right_as_the_reference(name: str) -> None:
    given = SPECS[name]
    form = linear_form(given)
    assert form is not None
    qkv, captures = inputs(given, 300, 300, torch.float32)
    wide = [x.double() for x in qkv], [x.double() if x.is_floating_point() else x for x in captures]
    verdict = compare(
        reference(given, *wide[0], wide[1])[0], reference(given, *qkv, captures)[0],
        linear.linear(given, form, *qkv, captures),
    )  # fmt: skip
    assert verdict.ok, verdict


def test_the_operator_runs_it_where_it_pays_and_its_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = SPECS["causal"]
    qkv, captures = inputs(given, 700, 700, torch.float32)
    with dispatch.use(attnopt.Options(first_use_check=False)) as used:
        monkeypatch.setattr(dispatch, "reference", None)
        monkeypatch.setattr("attnopt.runtime.gradient.reference", None)
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, _ = attention(given, *leaves, captures)
        out.sum().backward()
        assert used.sites[given.text].used == "cpp linear"
        assert dispatch.kernels(given) == "cpp linear"
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaves)


@pytest.mark.parametrize("name", ["divided", "decay", "padded", "line"])
def test_gradients_agree_with_those_of_the_reference(name: str) -> None:
    given = SPECS[name]
    qkv, captures = inputs(given, 300, 300)
    assert linear.chosen(given, qkv[0], qkv[1]) is not None
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in (*qkv, *captures)]
    out = reference(given, *leaves[:3], leaves[3:])[0]
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    golden = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], weight)
    needs = [x.requires_grad for x in leaves]
    found = gradients(given, weight, None, [x.detach() for x in leaves], [], needs)
    for g, f in zip(golden, found, strict=True):
        torch.testing.assert_close(f, g, rtol=1e-9, atol=1e-9)


def test_a_batch_entry_of_a_larger_batch_is_computed_alone() -> None:
    given = SPECS["padded"]
    form = linear_form(given)
    assert form is not None
    qkv, captures = inputs(given, 9, 9)
    one = linear.linear(given, form, *(x[1:] for x in qkv), captures, sample=Sample(torch.tensor([1]), whole_batch=2))
    torch.testing.assert_close(one, linear.linear(given, form, *qkv, captures)[1:])


def test_short_or_forced_inputs_do_not_run_it() -> None:
    given = SPECS["all"]
    qkv, captures = inputs(given, 4, 4, torch.float32)
    assert linear.chosen(given, qkv[0], qkv[1]) is None
    qkv, captures = inputs(given, 300, 300, torch.float32)
    with dispatch.use(attnopt.Options(kernel="reference")) as used:
        attention(given, *qkv, captures)
        assert used.sites[given.text].used == "reference"


def test_a_wrong_result_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = spec(ex.s / 5)
    qkv, captures = inputs(given, 300, 300, torch.float32)
    right = reference(given, *qkv, captures)[0]
    monkeypatch.setattr(linear, "_state", lambda keys, values: keys.transpose(-1, -2) @ values * 1.001)
    monkeypatch.setattr("attnopt.runtime.linear_native.build_linear", lambda *given: None)
    fresh = attnopt.Options(cache_dir=str(tmp_path))
    with dispatch.use(fresh) as used, pytest.warns(dispatch.AttnoptWarning, match="quadratic cost"):
        out, _ = attention(given, *qkv, captures)
        assert used.sites[given.text].used == "cpp"
        assert "disagrees with the reference" in used.sites[given.text].reason
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
