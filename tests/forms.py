"""Attentions that are no plain softmax, as rows, and the check that they are read, computed and differentiated rightly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from attnopt.runtime.validate import compare
from tests.modules import Function


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


QKV = (numbers(2, 4, 7, 8), numbers(2, 4, 9, 8, seed=1), numbers(2, 4, 9, 8, seed=2))
SELF = tuple(numbers(2, 4, 9, 8, seed=seed) for seed in (3, 4, 5))
LOWER = torch.ones(7, 9, dtype=torch.bool).tril()
H, S = "4 heads, d=8; ", "score "
SIGMOID, RELU = "(exp(-0.353553*s) + 1)**(-1)", "maximum(0.353553*s, 0)"
IS, NO_ROW = "; weight is the score", " (empty row: zero)"


@dataclass(frozen=True)
class Form:
    """A function of `inputs` (gradients are asked of the floating ones), the text of its spec and its form's name."""

    name: str
    run: Callable[..., Any]
    spec: str
    form: str
    inputs: tuple[Tensor, ...] = QKV


def check(row: Form) -> attnopt.Report:
    """One fused site of the expected spec and form, whose values and gradients are as right as eager PyTorch's."""
    model = Function(row.run)
    fast = attnopt.optimize(model, row.inputs, validate=False, options=attnopt.Options(kernel="reference"))
    sites = fast.report.sites
    assert [(str(s.spec), s.form, s.status) for s in sites] == [(row.spec, row.form, "fused")], str(fast.report)
    alike(model, fast, row.inputs)
    return fast.report


def alike(model: torch.nn.Module, fast: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients of `fast` within the contract of fp64."""
    golden, eager, kernel = outcome(model, inputs, double=True), outcome(model, inputs), outcome(fast, inputs)
    for place, (g, e, k) in enumerate(zip(golden, eager, kernel, strict=True)):
        if g is not None:
            verdict = compare(g, e, k, gradients=place > 0)
            assert verdict.ok, f"{'gradient' if place else 'value'} {place}: {verdict}"


def outcome(model: torch.nn.Module, inputs: tuple[Tensor, ...], double: bool = False) -> list[Tensor | None]:
    """The result and the gradients of a fixed combination of it."""
    leaves = [x.double() if double and x.is_floating_point() else x.clone() for x in inputs]
    leaves = [x.requires_grad_(x.is_floating_point()) for x in leaves]
    out = model(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.is_floating_point())]


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products."""
    return q @ k.mT / 8**0.5


def by_sum(weights: Tensor) -> Tensor:
    """Each row divided by its sum."""
    return weights / weights.sum(-1, keepdim=True)


def signed_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.sign() * s.abs().exp() / s.abs().exp().sum(-1, keepdim=True) @ v


def signed_stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s.sign() * s.abs().softmax(-1)) @ v


def signed_with_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = (s.abs() - s.abs().amax(-1, keepdim=True)).exp()
    return (s.sign() * e / e.sum(-1, keepdim=True)) @ v


def by_absolute_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet: a row is divided by its absolute sum where that is above one."""
    w = scores(q, k).masked_fill(~LOWER, 0)
    return w / w.abs().sum(-1, keepdim=True).clamp(min=1) @ v


def by_stabilised_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The matrix memory of xLSTM in its parallel form."""
    w = scores(q, k) * LOWER
    n = torch.maximum(w.sum(-1, keepdim=True).abs(), torch.ones(()))
    return (w / (n + 1e-6)) @ v


MASKED = f"{H}{S}{SIGMOID}; keep k <= q{NO_ROW}{IS}"
SIGNED = f"{H}{S}0.353553*abs(s); weight times sign(s)"
LOWEST = torch.finfo(torch.float32).min
POINTWISE = (
    Form("sigmoid", lambda q, k, v: scores(q, k).sigmoid() @ v, f"{H}{S}{SIGMOID}{IS}", "sigmoid"),
    Form("sigmoid_of_minus_infinity", lambda q, k, v: scores(q, k).masked_fill(~LOWER, -torch.inf).sigmoid() @ v, MASKED, "sigmoid"),
    Form("sigmoid_of_the_lowest", lambda q, k, v: scores(q, k).masked_fill(~LOWER, LOWEST).sigmoid() @ v, MASKED, "sigmoid"),
    Form("sigmoid_added_mask", lambda q, k, v: (scores(q, k) + torch.zeros(7, 9).masked_fill(~LOWER, -torch.inf)).sigmoid() @ v, MASKED, "sigmoid"),
    Form("sigmoid_times_mask", lambda q, k, v: (scores(q, k).sigmoid() * LOWER) @ v, MASKED, "sigmoid"),
    Form("sigmoid_where", lambda q, k, v: torch.where(LOWER, scores(q, k).sigmoid(), 0.0) @ v, MASKED, "sigmoid"),
    Form("relu", lambda q, k, v: scores(q, k).relu() @ v, f"{H}{S}{RELU}{IS}", "relu"),
    Form("relu_by_length", lambda q, k, v: (scores(q, k).relu() / k.shape[-2]) @ v, f"{H}{S}{RELU}/9{IS}", "relu"),
    Form("relu_by_clamp", lambda q, k, v: scores(q, k).clamp(min=0) @ v, f"{H}{S}{RELU}{IS}", "relu"),
    Form("relu_of_zeros", lambda q, k, v: scores(q, k).masked_fill(~LOWER, 0).relu() @ v, f"{H}{S}{RELU}; keep k <= q{NO_ROW}{IS}", "relu"),
    Form("squared_relu", lambda q, k, v: scores(q, k).relu().square() @ v, f"{H}{S}{RELU}**2{IS}", "squared relu"),
    Form("relu_normalised", lambda q, k, v: F.normalize(scores(q, k).relu(), p=1, dim=-1) @ v, f"{H}{S}{RELU}{IS}, row divided by maximum(t, 1e-12)", "relu"),
    Form("softplus_normalised", lambda q, k, v: by_sum(F.softplus(scores(q, k))) @ v, f"{H}{S}log(exp(-0.353553*abs(s)) + 1) + {RELU}{IS}, row divided by t", "softplus"),
    Form("tanh", lambda q, k, v: scores(q, k).tanh() @ v, f"{H}{S}tanh(0.353553*s){IS}", "tanh"),
    Form("silu_by_length", lambda q, k, v: (F.silu(scores(q, k)) / 9) @ v, f"{H}{S}0.0392837*s*{SIGMOID}{IS}", "silu"),
    Form("signed_by_hand", signed_by_hand, SIGNED, "signed"),
    Form("signed_with_maximum", signed_with_maximum, SIGNED, "signed"),
    Form("signed_stable", signed_stable, SIGNED, "signed"),
    Form("masked_product", lambda q, k, v: (scores(q, k) * LOWER) @ v, f"{H}{S}0.353553*s; keep k <= q{NO_ROW}{IS}", "linear"),
    Form("by_absolute_sum", by_absolute_sum, f"{H}{S}0.353553*s; keep k <= q{NO_ROW}{IS}, row divided by maximum(a, 1)", "bilinear"),
    Form("by_stabilised_sum", by_stabilised_sum, f"{H}{S}0.353553*s; keep k <= q{NO_ROW}{IS}, row divided by maximum(abs(t), 1) + 1e-06", "linear"),
    Form("transposed", lambda q, k, v: (v.mT @ scores(q, k).relu().mT).mT, f"{H}{S}{RELU}{IS}", "relu"),
    Form("einsum", lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).relu(), v), f"{H}{S}maximum(s, 0){IS}", "relu"),
    Form("shared_keys", lambda q, k, v: scores(q, k[:, :1].expand_as(v)).relu() @ v, f"4/1/4 heads, d=8; {S}{RELU}{IS}", "relu"),
)  # fmt: skip
