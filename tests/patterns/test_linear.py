"""Attention that is written in linear cost is read as such, with its denominator, its mask and its decay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from attnopt.capture import capture
from attnopt.patterns import find
from attnopt.runtime import dispatch
from tests.forms import SELF, Form, alike, by_sum, check, numbers
from tests.modules import Function

ONE = "4 heads, d=8; score s"
CAUSAL = f"{ONE}; keep k <= q (empty row: zero); weight is the score"


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def katharopoulos(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = phi(q), phi(k)
    state = torch.einsum("bhnd,bhne->bhde", k, v)
    z = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
    return torch.einsum("bhnd,bhde->bhne", q, state) * z.unsqueeze(-1)


def three_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Performer's own spelling."""
    q, k = phi(q), phi(k)
    z = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(-2))
    return torch.einsum("...de,...nd,...n->...ne", torch.einsum("...nd,...ne->...de", k, v), q, z)


def divided_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.exp(), k.exp()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT).clamp(min=1e-4)


def divided_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No feature map: the division is the evidence."""
    q, k = q.abs(), k.abs()
    return (q @ (k.mT @ v)) / ((q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-5)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.softmax(-1) * 8**-0.5) @ (k.softmax(-2).mT @ (v / 9))


def random_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.linspace(-1, 1, 64, dtype=q.dtype).view(8, 8).cos()
    q, k = (torch.exp(x @ w - x.square().sum(-1, keepdim=True) / 2) for x in (q, k))
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


def features_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SANA: heads by features by positions."""
    q, k, v = q.relu().mT, k.relu().mT, v.mT
    return ((v @ k.mT) @ q).mT


def running(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = phi(q), phi(k)
    state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    z = 1 / (torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2)) + 1e-6)
    return torch.einsum("bhnd,bhnde->bhne", q, state) * z[..., None]


def running_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu(), k.relu()
    state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return torch.einsum("bhnd,bhnde->bhne", q, state) / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


ALL = f"{ONE}; weight is the score"
ROWS = (
    Form("no_denominator", lambda q, k, v: phi(q) @ (phi(k).mT @ v), ALL, "linear", SELF),
    Form("katharopoulos", katharopoulos, f"{ALL}, row divided by t + 1e-06", "linear", SELF),
    Form("three_operands", three_operands, f"{ALL}, row divided by t", "linear", SELF),
    Form("divided_product", divided_product, f"{ALL}, row divided by maximum(t, 0.0001)", "linear", SELF),
    Form("divided_sum", divided_sum, f"{ALL}, row divided by t + 1e-05", "linear", SELF),
    Form("efficient", efficient, "4 heads, d=8; score 0.353553*s; weight is the score; gate 1/9", "linear", SELF),
    Form("random_features", random_features, f"{ALL}, row divided by t", "linear", SELF),
    Form("features_first", features_first, ALL, "linear", SELF),
    Form("running", running, f"{CAUSAL}, row divided by t + 1e-06", "linear", SELF),
    Form("running_products", running_products, f"{CAUSAL}, row divided by t + 1e-06", "linear", SELF),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_linear_source_is_read(row: Form) -> None:
    report = check(row)
    assert report.sites[0].pattern == "linear"


N = 400
LONG = (*(numbers(1, 2, N, 8, seed=seed) for seed in (3, 4, 5)), torch.tensor([0.1, 0.2]))


def lightning(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    gap = torch.arange(N)[:, None] - torch.arange(N)
    return (q @ k.mT * torch.where(gap >= 0, torch.exp(-rate[:, None, None] * gap), 0.0)) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    gap = (torch.arange(N)[:, None] - torch.arange(N)).clamp(min=0)
    return (q @ k.mT * (0.9**gap).tril()) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    line = torch.nn.functional.logsigmoid(q[..., 0] - k[..., 1]).cumsum(-1)
    gap = line.unsqueeze(-1) - line.unsqueeze(-2)
    return (q @ k.mT * gap.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf).exp()) @ v


def lower_triangle(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return by_sum((phi(q) @ phi(k).mT).tril()) @ v


def every_key(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    weights = q.relu() @ k.relu().mT
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


QUADRATIC = (
    (lightning, "linear with decay", "score s*exp(-(q - k)*bias[h]); keep k <= q (empty row: zero); weight is the score"),
    (retention, "linear with decay", "score s*exp(-0.105361*maximum(q - k, 0)); keep k <= q (empty row: zero); weight is the score"),
    (gated, "linear with decay", "score s*exp(bias[h, q] - bias[h, k]); keep k <= q (empty row: zero); weight is the score"),
    (lower_triangle, "linear", "score s; keep k <= q (empty row: zero); weight is the score, row divided by t"),
    (every_key, "linear", "score s; weight is the score, row divided by t + 1e-06"),
)  # fmt: skip


@pytest.mark.parametrize(("run", "form", "text"), QUADRATIC, ids=lambda x: getattr(x, "__name__", ""))
def test_quadratic_source_runs_at_linear_cost(run: object, form: str, text: str) -> None:
    model = Function(run)
    fast = attnopt.optimize(model, LONG)
    (site,) = fast.report.sites
    assert (site.status, site.form, site.kernel) == ("fused", form, "cpp linear")
    assert str(site.spec) == f"2 heads, d=8; {text}"
    with dispatch.use(attnopt.Options()):
        alike(model, fast, LONG)


def _mean_of_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided by something that is no sum of the row's weights."""
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / ((q * k.mean(-1, keepdim=True)).sum(-1, keepdim=True) + 1e-5)


def test_another_divisor_stays_outside_the_row_sum() -> None:
    gate = "gate (gate[b, h, q] + 1e-05)**(-1)"
    check(Form("", _mean_of_features, f"{ALL}; {gate}", "linear", SELF))


W = numbers(8, 8)
NEAR_MISSES = (
    ("chain", lambda q, k, v: q @ (k.mT @ v)),
    ("chain_by_length", lambda q, k, v: q @ (k.mT @ v) / 9),
    ("one_feature_map", lambda q, k, v: q @ (k.relu().mT @ v)),
    ("covariance", lambda q, k, v: q @ (k.mT @ k) / 9),
    ("shared_by_the_batch", lambda q, k, v: q.relu() @ (W.relu() @ W)),
    ("running_over_features", lambda q, k, v: q.relu() @ (k.relu().mT @ v).cumsum(-1).cumsum(-2)),
)


@pytest.mark.parametrize(("name", "run"), NEAR_MISSES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_chain_of_products_is_no_site(name: str, run: object) -> None:
    assert find(capture(Function(run), SELF, {}).gm.graph) == []
