"""Mixtures of heads: the exact statement of what is computed, both routers, refusals and declines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import attnopt
from attnopt.errors import OptionError
from attnopt.rewrites import MixHeads, PruneHeads, Tolerance

HEADS, WIDTH = 6, 4
INNER = HEADS * WIDTH
ANY = Tolerance(output=1e6)


class Layer(nn.Module):
    """Causal attention of six heads; `kind`: separate, or grouped."""

    def __init__(self, kind: str = "separate") -> None:
        super().__init__()
        self.kind, self.kv = kind, 2 if kind == "grouped" else HEADS
        self.q, self.o = nn.Linear(INNER, INNER), nn.Linear(INNER, INNER)
        self.k, self.v = (nn.Linear(INNER, self.kv * WIDTH) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, *(t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))

    def outputs(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """`[B, H, n, d]`."""
        q, k, v = self.heads(x)
        n = x.shape[1]
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        if pad is not None:
            scores = scores.masked_fill(~pad[:, None, None, :], -1e30)
        return scores.softmax(-1) @ v

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.o(self.outputs(x, pad).transpose(1, 2).flatten(2))


class Two(nn.Module):
    def __init__(self, kind: str = "separate") -> None:
        super().__init__()
        self.first, self.second = Layer(kind), Layer(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def _model(kind: str = "separate") -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    layer = Layer(kind).double().eval()
    with torch.no_grad():  # heads of different weight, so that there is something to choose
        layer.o.weight.mul_(torch.linspace(0.2, 2.0, HEADS, dtype=torch.float64).repeat_interleave(WIDTH))
    return layer, torch.randn(3, 11, INNER, dtype=torch.float64)


def _fast(model: nn.Module, *args: Tensor, limit: Tolerance = ANY, **options: Any) -> Any:
    rewrite = MixHeads(**{"shared": 1, "active": 2, "always": True, **options})
    return attnopt.optimize(model, args, rewrites=[rewrite], tolerance=limit, calibration=[args])


def _routes(fast: Any, layer: Layer, x: Tensor, router: str, active: int = 2, at: str = "root") -> Tensor:
    """`[B, H, n]` of zeros and ones, by the definition."""
    held = {n.rpartition(".")[2]: t for n, t in fast.state_dict().items() if n.startswith(f"attnopt.{at}.")}
    if router == "norm":
        scores = layer.heads(x)[0].norm(dim=-1) * held["scale"]
    else:
        scores = (x @ held["weight"].t() + held["bias"]).transpose(1, 2)
    gates = held["shared"].expand_as(scores).clone()
    ranked = scores.masked_fill(gates > 0, -torch.inf)
    return gates.scatter(1, ranked.topk(active, 1).indices, 1.0)


def _by_hand(fast: Any, layer: Layer, x: Tensor, router: str, *pad: Tensor, active: int = 2) -> Tensor:
    gates = _routes(fast, layer, x, router, active)[..., None]
    mean = fast.state_dict()["attnopt.root.mean"]
    mixed = gates * layer.outputs(x, *pad) + (1 - gates) * mean
    return layer.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["separate", "grouped"])
@pytest.mark.parametrize("router", ["norm", "linear"])
def test_what_is_computed(kind: str, router: str) -> None:
    layer, x = _model(kind)
    fast = _fast(layer, x, router=router)
    (site,) = fast.report.sites
    assert site.status == "rewritten"
    assert site.rewrites == ("mix_heads",)
    assert site.spec.rows != sp.true
    assert_close(fast(x), _by_hand(fast, layer, x, router), atol=1e-12, rtol=0)
    other = torch.randn_like(x)
    gates = _routes(fast, layer, other, router)
    assert bool((gates.sum(1) == 3).all()), "one shared head and two routed ones for each token"
    assert_close(fast(other), _by_hand(fast, layer, other, router), atol=1e-12, rtol=0)
    mean = layer.outputs(x).mean((0, 2))
    assert_close(fast.get_buffer("attnopt.root.mean")[:, 0], mean, atol=1e-12, rtol=0)


def test_the_shared_heads_are_those_that_are_missed_most() -> None:
    layer, x = _model()
    outputs = layer.outputs(x)
    gap = outputs - outputs.mean((0, 2))[:, None]
    columns = layer.o.weight.view(INNER, HEADS, WIDTH)
    missed = torch.einsum("bhnd,ohd->bhno", gap, columns).square().sum(-1).mean((0, 2))
    fast = _fast(layer, x, shared=2, active=1)
    shared = fast.get_buffer("attnopt.root.shared")[:, 0]
    assert set(shared.nonzero().flatten().tolist()) == set(missed.argsort()[-2:].tolist())


def test_the_linear_router_is_a_least_squares_fit_and_better_than_a_bad_one() -> None:
    layer, x = _model()
    fast = _fast(layer, x, router="linear")
    good = fast.report.figures["mix_heads"]["output change"]
    with torch.no_grad():
        fast.get_parameter("attnopt.root.weight").neg_()
        fast.get_parameter("attnopt.root.bias").neg_()
        bad = ((fast(x) - layer(x)).norm() / layer(x).norm()).item()
    assert good < 0.8 * bad


def test_gradients_reach_projections_and_the_router() -> None:
    layer, x = _model()
    fast = _fast(copy.deepcopy(layer), x, router="linear").train()
    loss = fast(x).square().sum()
    loss.backward()
    want = _by_hand(fast, layer, x, "linear").square().sum()
    assert_close(loss.detach(), want.detach(), atol=1e-9, rtol=1e-12)
    want.backward()
    for name in ("q.weight", "k.weight", "v.weight", "o.weight"):
        found, expected = fast.get_parameter(name).grad, layer.get_parameter(name).grad
        assert_close(found, expected, atol=1e-9, rtol=1e-9)
    router = fast.get_parameter("attnopt.root.weight")
    assert router.grad is not None
    assert router.grad.abs().max() > 0
    again = copy.deepcopy(fast).eval()
    assert_close(again(x), fast(x), atol=1e-12, rtol=0)


def test_sites_of_one_model_and_other_rewrites() -> None:
    torch.manual_seed(0)
    model, x = Two().double().eval(), torch.randn(2, 7, INNER, dtype=torch.float64)
    fast = _fast(model, x, router="linear")
    assert [s.rewrites for s in fast.report.sites] == [("mix_heads",)] * 2
    gates = _routes(fast, model.first, x, "linear", at="first")
    assert gates.shape == (2, HEADS, 7)
    some = _fast(model, x, sites=["second"])
    assert [s.status for s in some.report.sites] == ["fused", "rewritten"]
    both = attnopt.optimize(
        model,
        (x,),
        rewrites=[PruneHeads(heads={"first": [5]}), MixHeads(1, 2, always=True)],
        tolerance=ANY,
        calibration=[(x,)],
    )
    assert [s.rewrites for s in both.report.sites] == [("prune_heads", "mix_heads"), ("mix_heads",)]


def test_left_padding_and_one_token() -> None:
    layer, x = _model()
    pad = torch.arange(11)[None, :] >= torch.tensor([[0], [4], [10]])
    fast = _fast(layer, x, pad)
    assert_close(fast(x, pad), _by_hand(fast, layer, x, "norm", pad), atol=1e-12, rtol=0)
    one = x[:, :1].contiguous()
    fast = _fast(layer, one)
    assert_close(fast(one), _by_hand(fast, layer, one, "norm"), atol=1e-12, rtol=0)


def test_float32_runs_on_a_kernel_that_skips_rows() -> None:
    layer, x = _model()
    layer, x = layer.float(), x.float()
    fast = _fast(layer, x)
    assert fast.report.sites[0].kernel == "cpp"
    with torch.no_grad():
        assert_close(fast(x), _by_hand(fast, layer, x, "norm"), atol=1e-5, rtol=1e-4)


def test_the_tolerance_refuses_and_leaves_no_trace() -> None:
    layer, x = _model()
    fast = _fast(layer, x, limit=Tolerance(output=1e-6))
    assert [s.status for s in fast.report.sites] == ["fused"]
    assert set(fast.state_dict()) == set(layer.state_dict())
    assert_close(fast(x), layer(x), atol=1e-12, rtol=0)


class Shared(Two):
    """Both layers read their results through one output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.second.o = self.first.o


class Summed(Layer):
    """Two attentions, added up."""

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.o((self.outputs(x) + self.outputs(x.flip(1))).transpose(1, 2).flatten(2))


DECLINES = [
    (Layer, {"shared": 3, "active": 3}, "all of them would be on"),
    (Layer, {"shared": 4, "active": 4}, "8 cannot be on"),
    (Layer, {"always": False}, "million multiply-adds would be saved"),
    (Shared, {}, "used in another place too"),
    (Summed, {}, "used in another place too"),
]


@pytest.mark.parametrize(
    ("make", "options", "reason"), DECLINES, ids=["all on", "too many", "estimate", "shared", "sum"]
)
def test_declines_say_why(make: Any, options: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(2, 5, INNER, dtype=torch.float64)
    fast = _fast(model, x, **options)
    assert all(s.status == "fused" for s in fast.report.sites)
    assert reason in str(fast.report)
    assert_close(fast(x), model(x), atol=1e-12, rtol=0)
    assert set(fast.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "luck"}, "norm, linear"),
        ({"shared": -1}, "at least 0"),
        ({"active": 0}, "at least 1"),
        ({"active": True}, "at least 1"),
        ({"active": 1.5}, "at least 1"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MixHeads(**options)


def test_a_site_that_does_not_exist() -> None:
    layer, x = _model()
    with pytest.raises(OptionError, match="there is no attention site 'nowhere'"):
        _fast(layer, x, sites=["nowhere"])
