"""`Sparsify`: the mask that a site then has, what it computes, what is left alone, and what is refused."""

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
from attnopt.rewrites import PruneHeads, Sparsify, Tolerance
from attnopt.runtime.chosen import chosen
from tests.passes.tiny import HEADS, INNER, KV, WIDTH

ANY = Tolerance(output=1e6)
LONG = 96


class Layer(nn.Module):
    """Grouped attention by hand: causal or full, of `y` if it is given, padded by `pad`."""

    def __init__(self, causal: bool = True, sigmoid: bool = False) -> None:
        super().__init__()
        self.causal, self.sigmoid = causal, sigmoid
        self.q, self.o = nn.Linear(INNER, INNER), nn.Linear(INNER, INNER)
        self.k, self.v = (nn.Linear(INNER, KV * WIDTH) for _ in range(2))

    def heads(self, x: Tensor, y: Tensor) -> list[Tensor]:
        pairs = ((self.q, x), (self.k, y), (self.v, y))
        return [f(t).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f, t in pairs]

    def attend(self, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.heads(x, y)
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = 2 * (q @ k.mT) / WIDTH**0.5
        weights = scores.sigmoid() * keep if self.sigmoid else scores.masked_fill(~keep, -torch.inf).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def mask(self, n_q: int, n_k: int, pad: Tensor | None) -> Tensor:
        keep = torch.ones(n_q, n_k, dtype=torch.bool)
        keep = keep.tril() if self.causal else keep
        return keep if pad is None else keep & pad[:, None, None]

    def forward(self, x: Tensor, y: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.attend(x, y, self.mask(x.shape[1], y.shape[1], pad))


def _made(n: int = LONG, **options: Any) -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    return Layer(**options).double().eval(), torch.randn(2, n, INNER, dtype=torch.float64)


def _optimize(model: nn.Module, *args: Any, tolerance: Any = ANY, **options: Any) -> Any:
    return attnopt.optimize(model, args, rewrites=[Sparsify(**options)], tolerance=tolerance)


def _near(layer: Layer, n: int, windows: list[int], sinks: int) -> Tensor:
    place = torch.arange(n)
    gap = place[:, None] - place
    kept = [(gap < w if layer.causal else gap.abs() <= w // 2) | (place < sinks) for w in windows]
    return torch.stack(kept) & layer.mask(n, n, None)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_with_sinks(causal: bool) -> None:
    layer, x = _made(causal=causal)
    fast = _optimize(layer, x, method="window", window=10, sinks=3, always=True)
    (site,) = fast.report.sites
    assert (site.status, site.rewrites) == ("rewritten", ("sparsify",))
    assert_close(fast(x), layer.attend(x, x, _near(layer, LONG, [10] * HEADS, 3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [[8, None, 20, 20], {0: 8, 2: 20, 3: 20}])
def test_a_window_of_each_head(window: Any) -> None:
    layer, x = _made()
    fast = _optimize(layer, x, method="window", window=window, sinks=0, always=True)
    assert_close(fast(x), layer.attend(x, x, _near(layer, LONG, [8, LONG, 20, 20], 0)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options", [{"top": 3}, {"mass": 0.4, "shared": True}, {"top": [1, 2, 3, 4], "sinks": 0}, {"top": 2, "tile": 1}],
    ids=str,
)  # fmt: skip
def test_blocks_are_dense_attention_under_the_choice(options: dict[str, Any]) -> None:
    layer, x = _made()
    options = {"block": 8, "tile": 16, **options}
    fast = _optimize(layer, x, method="blocks", always=True, **options)
    (site,) = fast.report.sites
    assert site.spec is not None
    assert site.spec.select is not None
    assert site.spec.select.own == ex.q
    q, k, _ = layer.heads(x, x)
    picked = chosen(site.spec, q, k)
    kept = picked.repeat_interleave(options["tile"], 2).repeat_interleave(8, 3)
    assert 0.05 < picked.double().mean() < 0.6
    assert_close(fast(x), layer.attend(x, x, kept & layer.mask(LONG, LONG, None)), atol=1e-12, rtol=0)


def test_left_padding_and_everything_selected() -> None:
    layer, x = _made()
    pad = torch.arange(LONG) >= torch.tensor([[40], [0]])
    pad[:, 0] = True  # no row is empty
    fast = attnopt.optimize(
        layer, (x,), {"pad": pad}, rewrites=[Sparsify("blocks", top=99, block=16, always=True)], tolerance=1e-9
    )
    assert_close(fast(x, pad=pad), layer(x, pad=pad), atol=1e-12, rtol=0)
    few = attnopt.optimize(
        layer, (x,), {"pad": pad}, rewrites=[Sparsify("blocks", top=2, block=16, tile=16, always=True)], tolerance=ANY
    )
    assert bool(few(x, pad=pad).isfinite().all())


def test_fewer_keys_than_a_block() -> None:
    layer, x = _made(n=7)
    fast = _optimize(layer, x, method="blocks", top=1, always=True, tolerance=1e-9)
    assert fast.report.sites[0].status == "rewritten"
    assert_close(fast(x), layer(x), atol=1e-12, rtol=0)


def test_it_trains_with_the_gradients_of_dense_attention_under_the_mask() -> None:
    layer, x = _made()
    fast = _optimize(layer, x, method="window", window=10, sinks=2, always=True)
    fast.train()
    fast(x).square().sum().backward()
    twin = copy.deepcopy(layer)
    twin.attend(x, x, _near(layer, LONG, [10] * HEADS, 2)).square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert_close(fast.get_parameter(name).grad, parameter.grad, atol=1e-9, rtol=1e-9)


def test_what_is_left_alone_and_why() -> None:
    layer, x = _made(n=40)
    for options in ({"method": "window", "window": 8}, {"method": "blocks", "top": 3, "block": 16}):
        (site,) = _optimize(layer, x, **options).report.sites
        assert (site.status, site.rewrites) == ("fused", ())
    notes = str(_optimize(layer, x, method="blocks", top=3, block=16).report)
    assert "it would not pay" in notes
    assert "million multiplications a head" in notes
    assert _optimize(layer, x, method="blocks", top=2, length=8192).report.sites[0].status == "rewritten"
    assert _optimize(layer, x, method="window", window=64, length=8192).report.sites[0].status == "rewritten"
    assert not _optimize(layer, x, method="blocks", mass=0.999999, block=8, tile=8).report.sites[0].rewrites


@pytest.mark.parametrize(
    ("layer", "more", "why"),
    [
        ({"causal": False}, {"y": torch.zeros(2, 30, INNER, dtype=torch.float64)}, "no self-attention: 40 queries"),
        ({"causal": False}, {"y": torch.zeros(2, 40, INNER, dtype=torch.float64)}, "cross-attention"),
        ({"sigmoid": True}, {}, "no softmax"),
    ],
)
def test_sites_that_do_not_fit(layer: dict[str, Any], more: dict[str, Any], why: str) -> None:
    module, x = _made(n=40, **layer)
    for rewrite in (Sparsify("window", window=8, always=True), Sparsify("blocks", top=1, always=True)):
        fast = attnopt.optimize(module, (x,), more, rewrites=[rewrite], tolerance=ANY)
        assert fast.report.sites[0].rewrites == ()
        assert why in str(fast.report)
        assert_close(fast(x, **more), module(x, **more), atol=1e-12, rtol=0)


def test_a_tolerance_refuses() -> None:
    layer, x = _made()
    fast = _optimize(layer, x, method="window", window=2, sinks=0, always=True, tolerance=1e-6)
    assert fast.report.sites[0].rewrites == ()
    assert "refused" in str(fast.report)
    assert_close(fast(x), layer(x), atol=1e-12, rtol=0)


def test_it_composes() -> None:
    layer, x = _made()
    rewrites = [
        PruneHeads(heads={0: [1]}), Sparsify("window", window=40, always=True),
        Sparsify("blocks", top=2, block=8, tile=8, always=True), Sparsify("blocks", top=1, always=True),
    ]  # fmt: skip
    fast = attnopt.optimize(layer, (x,), rewrites=rewrites, tolerance=ANY)
    (site,) = fast.report.sites
    assert site.rewrites == ("prune_heads", "sparsify", "sparsify", "shared_heads")
    assert site.spec is not None
    assert len(ex.conjuncts(site.spec.keep)) == 2
    assert "selected already" in str(fast.report)


def test_heads_that_choose_together_stay_apart_from_others() -> None:
    layer, x = _made()
    rewrites = [PruneHeads(heads={0: [1]}), Sparsify("blocks", top=2, block=8, tile=8, shared=True, always=True)]
    (site,) = attnopt.optimize(layer, (x,), rewrites=rewrites, tolerance=ANY).report.sites
    assert site.rewrites == ("prune_heads", "sparsify")
    assert site.spec.heads.k == HEADS - 1, "who shares a key head decides who chooses"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "random"}, "choose one of window, blocks"),
        ({}, "needs window=256"),
        ({"window": 0}, "positive whole number"),
        ({"window": True}, "positive whole number"),
        ({"window": 8, "top": 2}, "belongs to method='blocks'"),
        ({"method": "blocks", "window": 8, "top": 2}, "belongs to method='window'"),
        ({"method": "blocks"}, "either top=8"),
        ({"method": "blocks", "top": 2, "mass": 0.5}, "either top=8"),
        ({"method": "blocks", "top": 2.5}, "positive whole number"),
        ({"method": "blocks", "top": [2, None]}, "positive whole number"),
        ({"method": "blocks", "mass": 1.5}, "between 0 and 1"),
        ({"method": "blocks", "top": 2, "block": 48}, "power of two"),
        ({"window": 8, "sinks": -1}, "0 or more"),
        ({"window": 8, "length": 0}, "positive number"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Sparsify(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"window": [1, 2]}, "2 numbers, and the site has 4 heads"),
        ({"window": {4: 2}}, "heads 0 to 3"),
        ({"method": "blocks", "top": {0: 2}}, "heads 0 to 3"),
        ({"method": "blocks", "mass": [0.5] * 4, "shared": True}, "4 numbers, and the site has 2 heads"),
        ({"window": 8, "sites": ["nowhere"]}, "no attention site 'nowhere'"),
    ],
)
def test_heads_and_sites_that_are_not_there(arguments: dict[str, Any], said: str) -> None:
    layer, x = _made(n=8)
    with pytest.raises(OptionError, match=said):
        _optimize(layer, x, **arguments)


def test_amounts_are_exact() -> None:
    layer, x = _made()
    fast = _optimize(layer, x, method="blocks", mass=0.3, always=True)
    assert fast.report.sites[0].spec.select.amount == (sp.Rational(3, 10),)
    assert fast.report.sites[0].spec.select.scale == fast.report.sites[0].spec.score / ex.s
