"""Biases of the scores as further dimensions of query and key, or as lines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import attnopt
from attnopt import expr as ex
from attnopt.errors import OptionError
from attnopt.rewrites import FactorBias, Tolerance

HEADS, WIDTH, N = 4, 6, 9
INNER = HEADS * WIDTH
EXACT = Tolerance(output=1e-10)
ANY = Tolerance(output=1e6)


def _places(n: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(n, dtype=torch.float64)
    return place[:, None], place


class Biased(nn.Module):
    """Causal or full attention with a bias on its scores; `kv` key heads, each repeated."""

    def __init__(self, kind: str, kv: int = HEADS) -> None:
        super().__init__()
        self.kind, self.kv = kind, kv
        self.q, self.o = nn.Linear(INNER, INNER), nn.Linear(INNER, INNER)
        self.k, self.v = (nn.Linear(INNER, kv * WIDTH) for _ in range(2))
        self.slope = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        thin = torch.randn(HEADS, N, 2) @ torch.randn(HEADS, 2, N)
        if kind in ("table", "mixed"):
            self.table = nn.Parameter(thin + 1e-7 * torch.randn(HEADS, N, N))
        if kind == "full rank":
            self.table = nn.Parameter(torch.randn(HEADS, N, N))
        if kind == "window":
            self.table = nn.Parameter(torch.randn(25, HEADS))
            x, y = torch.arange(N) // 3, torch.arange(N) % 3
            self.register_buffer("places", 5 * (x[:, None] - x + 2) + y[:, None] - y + 2)
        if kind == "toeplitz":
            gap = torch.arange(N)[None, :] - torch.arange(N)[:, None]
            self.register_buffer("table", -self.slope.detach()[:, None, None] * gap.abs().sqrt())

    def bias(self, n: int, x: Tensor) -> Tensor:
        q, k = _places(n)
        slope = self.slope[:, None, None]
        if self.kind in ("alibi", "mixed"):
            found = slope * (k - q)
            return found + self.table if self.kind == "mixed" else found
        if self.kind == "alibi size":
            return -slope * (k - q).abs()
        if self.kind == "squares":
            return -slope * (k - q) ** 2 / 8 + torch.sin(q) * torch.cos(k / 3)
        if self.kind == "window":
            return self.table[self.places.view(-1)].view(N, N, HEADS).permute(2, 0, 1)
        if self.kind == "from input":
            return x.mean((0, 2))[:n, None] * x.mean((0, 2))[:n] + torch.einsum("bqd,bkd->qk", x, x)
        return self.table[:, :n, :n]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, *(t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.heads(x)
        scores = q @ k.mT / WIDTH**0.5 + self.bias(n, x)
        if self.kind in ("alibi", "alibi size", "mixed"):
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, INNER))


def _model(kind: str, kv: int = HEADS) -> tuple[Biased, Tensor]:
    torch.manual_seed(0)
    return Biased(kind, kv).double().eval(), torch.randn(2, N, INNER, dtype=torch.float64)


def _fast(model: nn.Module, x: Tensor, limit: Tolerance = EXACT, **options: Any) -> Any:
    return attnopt.optimize(model, (x,), rewrites=[FactorBias(**{"when": "always", **options})], tolerance=limit)


# kind, key heads, head width afterwards, what is left of the score
CLOSED = [
    ("alibi", HEADS, WIDTH + 1),
    ("alibi size", HEADS, WIDTH + 1),
    ("alibi", 2, WIDTH + 1),
    ("squares", HEADS, WIDTH + 3),
    ("squares", 1, WIDTH + 3),
]


@pytest.mark.parametrize(("kind", "kv", "width"), CLOSED)
def test_closed_forms_are_exact_in_fp64(kind: str, kv: int, width: int) -> None:
    model, x = _model(kind, kv)
    fast = _fast(model, x)
    (site,) = fast.report.sites
    assert site.status == "rewritten"
    assert site.rewrites == ("factor_bias",)
    assert site.spec.heads.d_qk == width
    assert sp.simplify(site.spec.score / ex.s).is_number, "no bias is left"
    assert_close(fast(x), model(x), atol=1e-10, rtol=0)


def test_gradients_flow_to_the_slopes_and_to_the_projections() -> None:
    model, x = _model("alibi")
    fast = _fast(copy.deepcopy(model), x).train()
    fast(x).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(fast.get_parameter(name).grad, parameter.grad, atol=1e-10, rtol=1e-9)


def test_a_table_becomes_parameters_of_its_rank() -> None:
    model, x = _model("table")
    fast = _fast(model, x, ANY, tolerance=1e-4)
    (site,) = fast.report.sites
    assert site.spec.heads.d_qk == WIDTH + 2
    assert site.spec.captures == ()
    assert_close(fast(x), model(x), atol=1e-5, rtol=0)
    phi, psi = fast.get_parameter("attnopt.root.phi"), fast.get_parameter("attnopt.root.psi")
    assert phi.shape == psi.shape == (HEADS, N, 2)
    assert fast.get_parameter("table").numel() == 0, "the table is gone"
    assert model.table.shape == (HEADS, N, N), "the model itself is never changed"
    fast.train()
    fast(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (phi, psi, fast.get_parameter("q.weight")))
    assert fast(x).dtype == torch.float64
    again = copy.deepcopy(fast).eval()
    assert_close(again(x), fast.eval()(x), atol=0, rtol=0)


def test_full_rank_is_exact_and_ranks_bound_the_error() -> None:
    model, x = _model("full rank")
    exact = _fast(model, x, tolerance=1e-12)
    assert_close(exact(x), model(x), atol=1e-10, rtol=0)
    errors = []
    for rank in (1, 3, 6):
        fast = _fast(model, x, ANY, rank=rank)
        assert fast.report.sites[0].spec.heads.d_qk == WIDTH + rank
        errors.append(fast.report.figures["factor_bias"]["output change"])
    assert errors[0] > errors[1] > errors[2] > 0


def test_heads_that_share_keys_share_the_key_side() -> None:
    model, x = _model("table", kv=2)
    fast = _fast(model, x, ANY, tolerance=1e-4)
    assert fast.get_parameter("attnopt.root.phi").shape == (HEADS, N, 4)
    assert fast.get_parameter("attnopt.root.psi").shape == (2, N, 4)
    assert_close(fast(x), model(x), atol=1e-5, rtol=0)


def test_a_gathered_table_as_in_swin() -> None:
    model, x = _model("window")
    fast = _fast(model, x, tolerance=1e-12)
    (site,) = fast.report.sites
    assert site.status == "rewritten"
    assert site.spec.captures == ()
    assert fast.get_parameter("table").numel() == 0
    assert_close(fast(x), model(x), atol=1e-10, rtol=0)
    assert not any("index" in str(n.target) for n in next(iter(fast._compiled.values())).run.graph.nodes)


def test_a_table_of_distances_becomes_a_line_bit_by_bit() -> None:
    model, x = _model("toeplitz")
    fast = _fast(model, x)
    (site,) = fast.report.sites
    assert site.spec.heads.d_qk == WIDTH
    assert [c.name for c in site.spec.captures] == ["line"]
    line = fast.get_buffer("attnopt.root.line")
    assert line.shape == (HEADS, 2 * N - 1)
    assert torch.equal(line[:, N - 1 :], model.table[:, 0])
    assert_close(fast(x), model(x), atol=1e-12, rtol=0)


def test_both_kinds_at_once() -> None:
    model, x = _model("mixed")
    fast = _fast(model, x, tolerance=1e-12)
    (site,) = fast.report.sites
    assert site.spec.captures == ()
    assert_close(fast(x), model(x), atol=1e-10, rtol=0)


def test_the_tolerance_refuses_and_leaves_no_trace() -> None:
    model, x = _model("full rank")
    fast = _fast(model, x, Tolerance(output=1e-6), rank=2)
    (site,) = fast.report.sites
    assert site.status == "fused"
    assert set(fast.state_dict()) == set(model.state_dict())
    assert torch.equal(fast.get_parameter("table"), model.table)
    assert "refused" in str(fast.report)


DECLINES = [
    ("from input", {}, "depends on the model's inputs"),
    ("alibi", {"when": "pays"}, "1 further dimensions would cost"),
    ("table", {"when": "pays", "tolerance": 1e-4}, "multiply-adds a score"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), DECLINES)
def test_declines_say_why(kind: str, options: dict[str, Any], reason: str) -> None:
    model, x = _model(kind)
    fast = _fast(model, x, **options)
    assert fast.report.sites[0].status == "fused"
    assert reason in str(fast.report)
    assert_close(fast(x), model(x), atol=1e-10, rtol=0)


def test_a_bias_inside_a_soft_cap_stays() -> None:
    class Capped(Biased):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            scores = 20 * torch.tanh((q @ k.mT + self.bias(N, x)) / 20)
            return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Capped("alibi").double().eval(), torch.randn(1, N, INNER, dtype=torch.float64)
    fast = _fast(model, x)
    assert fast.report.sites[0].status == "fused"
    assert "not added to the plain product" in str(fast.report)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 2, "tolerance": 0.1}, "not both"),
        ({"rank": 0}, "positive whole number"),
        ({"rank": True}, "positive whole number"),
        ({"tolerance": 1.0}, "from 0 to below 1"),
        ({"when": "maybe"}, "pays or always"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        FactorBias(**options)


def test_a_site_that_does_not_exist() -> None:
    model, x = _model("alibi")
    with pytest.raises(OptionError, match="there is no attention site 'nowhere'"):
        _fast(model, x, sites=["nowhere"])
