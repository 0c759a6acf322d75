"""The way to the C++ backward: what the forward keeps for it, and when another way is taken."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_backward import undifferentiable
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import cpp_gradient
from attnopt.runtime.dispatch import AttnoptWarning, kernel_used, use
from attnopt.runtime.op import attention
from attnopt.runtime.reference import reference
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Pointwise
from tests.runtime.cases import BIASED, CAUSAL, PLAIN, inputs, padded

BIAS = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def options(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Options]:
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-O0"))
    made = Options(cache_dir=f"{tmp_path}/cache", kernel="cpp")
    with use(made):
        yield made


def _both(spec: AttentionSpec, *captures: torch.Tensor) -> None:
    leaves = [t.requires_grad_(t.is_floating_point()) for t in (*inputs(spec), *(c.clone() for c in captures))]
    learned = [t for t in leaves if t.requires_grad]
    out, _ = attention(spec, *leaves[:3], leaves[3:])
    got = torch.autograd.grad(out.square().sum(), learned)
    want = torch.autograd.grad(reference(spec, *leaves[:3], leaves[3:])[0].square().sum(), learned)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_recorded_call_keeps_lse_and_its_kernel_runs(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    run = cpp_gradient.Gradients.run

    def watched(self: cpp_gradient.Gradients, *args: object) -> dict[int, torch.Tensor]:
        seen.append(args[4][1] is not None)  # type: ignore[index]
        return run(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(cpp_gradient.Gradients, "run", watched)
    _both(CAUSAL)
    assert seen == [True, True]  # on a sample, then on the inputs
    assert kernel_used(CAUSAL.key) == "cpp"


def test_captures_and_sinks_have_gradients(options: Options) -> None:
    _both(BIASED, BIAS)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, 2:] = False
    _both(padded(EmptyRow.ZERO, sink=True), keep, torch.randn(4))


def test_lse_stays_empty_for_who_did_not_ask(options: Options) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(PLAIN))
    assert attention(PLAIN, q, k, v)[1].shape == (0,)
    assert attention(BIASED, q, k, v, [BIAS])[1].shape == (2, 4, 5)


def test_which_calls_ask_for_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    options, text = Options(kernel="cpp"), PLAIN.text
    assert AttentionSpec.parse(cpp_gradient.recorded_text(text, torch.float32, options)).returns == ("lse",)
    assert cpp_gradient.recorded_text(text, torch.float64, options) == text
    assert cpp_gradient.recorded_text(text, torch.float32, replace(options, kernel="sdpa")) == text
    odd = replace(PLAIN, heads=Heads(4, 2, 2, 8, 6, (0, 1, 0, 1))).text
    assert cpp_gradient.recorded_text(odd, torch.float32, options) == odd

    def missing(options: Options) -> None:
        raise CompileError("no compiler")

    monkeypatch.setattr(cpp_gradient, "find_compiler", missing)
    assert cpp_gradient.recorded_text(text, torch.float32, options) == text


def test_what_has_no_kernel_is_logged_and_still_right(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    gated = replace(PLAIN, gate=ex.load("gain", ex.h), captures=(Capture("gain", "float", (4,)),))
    with caplog.at_level("INFO", logger="attnopt"):
        _both(gated, torch.randn(4))
    assert "no gradient of gain, which a whole row is multiplied by" in caplog.text


def test_pointwise_weights_that_grow_as_exponentials_go_another_way() -> None:
    grows = replace(PLAIN, normalizer=Pointwise(), score=sp.exp(ex.s))
    assert "grow as exponentials" in (undifferentiable(grows, Layout("float32", ()), ()) or "")
    squared = replace(PLAIN, normalizer=Pointwise(), score=1 / (1 + sp.exp(-ex.s)) ** 2)
    assert "grow as exponentials" in (undifferentiable(squared, Layout("float32", ()), ()) or "")


@pytest.mark.parametrize("score", [1 / (1 + sp.exp(-ex.s)), 3 / (2 + 5 * sp.exp(1 - 2 * ex.s))], ids=str)
def test_a_sigmoid_has_a_gradient_at_any_score(score: sp.Expr, options: Options) -> None:
    spec = replace(PLAIN, normalizer=Pointwise(), score=score)
    q, k, v = inputs(spec)
    leaves = [t.requires_grad_() for t in (q * 1e3, k, v)]
    got = torch.autograd.grad(attention(spec, *leaves)[0].square().sum(), leaves)
    want = torch.autograd.grad(reference(spec, *leaves)[0].square().sum(), leaves)
    assert all(g.isfinite().all() for g in want)
    for mine, theirs in zip(got, want, strict=True):
        # Scores of a thousand have four digits behind the point, and the slopes of a sigmoid no more.
        assert_close(mine, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=0)
    assert kernel_used(spec.key) == "cpp"


def test_other_head_maps_go_another_way(options: Options) -> None:
    _both(replace(PLAIN, heads=Heads(4, 2, 2, 8, 6, (0, 1, 0, 1))))


def test_an_untrusted_kernel_is_not_used(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_gradient, "objection", lambda *args: "it is wrong.")
    with pytest.warns(AttnoptWarning, match="it is wrong"):
        _both(replace(PLAIN, keep=BIASED.keep, empty_row=EmptyRow.ZERO))


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_first_gradient_that_says_nothing_decides_nothing(value: float, options: Options) -> None:
    cpp_gradient._KNOWN.clear()
    q, k, v = (t.requires_grad_() for t in inputs(CAUSAL))
    out, _ = attention(CAUSAL, q, k, v)
    grad = torch.zeros_like(out)
    grad[0, 0, 2, 1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnoptWarning)
        out.backward(grad)
        _both(CAUSAL)
    (kernel,) = cpp_gradient._KNOWN.values()
    assert not kernel.problem
    assert kernel.checked


def test_a_wrong_kernel_is_seen_though_the_first_gradient_is_zero(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp_gradient._KNOWN.clear()
    run = cpp_gradient.Gradients.run

    def doubled(self: cpp_gradient.Gradients, *args: object) -> dict[int, torch.Tensor]:
        return {place: 2 * found for place, found in run(self, *args).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(cpp_gradient.Gradients, "run", doubled)
    q, k, v = (t.requires_grad_() for t in inputs(CAUSAL))
    with pytest.warns(AttnoptWarning, match="disagrees"):
        (attention(CAUSAL, q, k, v)[0] * 0).sum().backward()
    cpp_gradient._KNOWN.clear()


def test_without_keys_or_queries_gradients_are_zero(options: Options) -> None:
    for sizes in ((2, 0, 7), (2, 5, 0), (0, 5, 7)):
        q, k, v = (t.requires_grad_() for t in inputs(PLAIN, *sizes))
        found = torch.autograd.grad(attention(PLAIN, q, k, v)[0].sum(), (q, k, v))
        assert all(not g.any() for g in found)
