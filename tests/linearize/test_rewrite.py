"""Softmax attention becomes linear: the formula it then computes, what stays as it is, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import attnopt
from attnopt.errors import OptionError
from attnopt.linearize.features import MAPS, eager
from attnopt.rewrites import Linearize, Tolerance
from tests.passes.tiny import HEADS, INNER, KV, WIDTH

ANY = Tolerance(output=1e6)
LONG = 200


class Layer(nn.Module):
    """Grouped causal or full attention; `change` is applied to the scores."""

    def __init__(self, causal: bool = True, change: Any = None, pad: bool = False, sdpa: bool = False) -> None:
        super().__init__()
        self.causal, self.change, self.pad, self.sdpa = causal, change, pad, sdpa
        self.q, self.o = nn.Linear(INNER, INNER), nn.Linear(INNER, INNER)
        self.k, self.v = (nn.Linear(INNER, KV * WIDTH) for _ in range(2))

    def heads(self, x: Tensor, y: Tensor) -> list[Tensor]:
        pairs = ((self.q, x), (self.k, y), (self.v, y))
        return [f(t).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f, t in pairs]

    def mask(self, n_q: int, n_k: int, pad: Tensor | None) -> Tensor:
        keep = torch.ones(n_q, n_k, dtype=torch.bool)
        keep = keep.tril() if self.causal else keep
        return keep if pad is None else keep & pad[:, None, None]

    def forward(self, x: Tensor, y: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x, x if y is None else y)
        if self.sdpa:
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
            return self.o(out.transpose(1, 2).flatten(2))
        k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
        scores = 2 * (q @ k.mT) / WIDTH**0.5
        scores = scores if self.change is None else self.change(scores)
        scores = scores.masked_fill(~self.mask(q.shape[2], k.shape[2], pad), -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _made(n: int = LONG, seed: int = 0, **options: Any) -> tuple[Layer, Tensor]:
    torch.manual_seed(seed)
    return Layer(**options).eval(), torch.randn(2, n, INNER)


def _by_hand(layer: Layer, feature: str, x: Tensor, y: Tensor | None = None, pad: Tensor | None = None,
             learned: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:  # fmt: skip
    q, k, v = layer.heads(x, x if y is None else y)
    q, k = (MAPS[feature].make(eager, t, w) for t, w in zip((q, k), learned, strict=True))
    k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
    weights = (q @ k.mT) * layer.mask(q.shape[2], k.shape[2], pad)
    total = weights.sum(-1, keepdim=True)
    out = (weights / (total.clamp_min(1e-6) if feature == "relu" else total)) @ v
    return layer.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _optimize(model: nn.Module, *args: Any, tolerance: Any = ANY, **options: Any) -> Any:
    rewrite = Linearize(**{"progress": False, **options})
    return attnopt.optimize(model, args, rewrites=[rewrite], tolerance=tolerance, calibration=[args])


@pytest.mark.parametrize("feature", ["elu", "relu"])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sdpa": True}], ids=str)
def test_it_computes_the_formula(feature: str, options: dict[str, Any]) -> None:
    layer, x = _made(**options)
    fast = _optimize(layer, x, feature=feature)
    (site,) = fast.report.sites
    assert (site.status, site.rewrites, site.kernel) == ("rewritten", ("linearize",), "cpp linear")
    assert_close(fast(x), _by_hand(layer, feature, x), atol=3e-6, rtol=0)
    assert not torch.allclose(fast(x), layer(x), atol=1e-3)


def test_cross_attention_and_padding() -> None:
    layer, x = _made(causal=False)
    y, pad = torch.randn(2, 150, INNER), torch.rand(2, 150) > 0.3
    fast = _optimize(layer, x, y, pad, feature="elu")
    assert_close(fast(x, y, pad), _by_hand(layer, "elu", x, y, pad), atol=3e-6, rtol=0)
    causal, x = _made()
    pad = torch.rand(2, LONG) > 0.3
    pad[1, :4] = False  # rows without any key are NaN, as they were
    fast = _optimize(causal, x, None, pad, feature="elu")
    found = fast(x, None, pad)
    assert bool(found[1, :4].isnan().all())
    assert_close(found, _by_hand(causal, "elu", x, None, pad), atol=3e-6, rtol=0, equal_nan=True)


def test_a_learned_map_is_closer_than_a_fixed_one_and_belongs_to_the_model() -> None:
    layer, x = _made()
    source = copy.deepcopy(layer.state_dict())
    model = nn.Sequential(layer)
    fixed = _optimize(model, x, feature="elu")
    fast = _optimize(model, x, feature="hedgehog", steps=40, length=4096)
    gap = [float((f(x) - layer(x)).norm().detach()) for f in (fixed, fast)]
    assert gap[1] < 0.9 * gap[0]
    learned = fast.get_parameter("attnopt.0.query_map"), fast.get_parameter("attnopt.0.key_map")
    assert [t.shape for t in learned] == [(HEADS, WIDTH, WIDTH), (KV, WIDTH, WIDTH)]
    assert_close(fast(x), _by_hand(layer, "hedgehog", x, learned=learned), atol=3e-6, rtol=0)
    # Training mode captures again: it takes the maps that are there, and they get gradients.
    fast.train()
    assert_close(fast(x), _by_hand(layer, "hedgehog", x, learned=learned), atol=3e-6, rtol=0)
    fast(x).square().sum().backward()
    assert all(t.grad is not None and bool((t.grad != 0).any()) for t in learned)
    assert all(torch.equal(layer.state_dict()[name], held) for name, held in source.items())
    again = copy.deepcopy(fast).eval()
    assert_close(again(x), fast.eval()(x), atol=0, rtol=0)


def _windowed(layer: Layer, x: Tensor, window: int, learned: list[Tensor]) -> Tensor:
    q, k, v = (t.double() for t in layer.heads(x, x))
    features = [MAPS["hedgehog"].make(eager, t, w.double()) for t, w in zip((q, k), learned, strict=False)]
    k, far_k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, features[1], v))
    gap = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    near = torch.exp(2 * q @ k.mT / WIDTH**0.5) * ((gap >= 0) & (gap < window))
    far = (features[0] * learned[2].double().exp()) @ far_k.mT * (gap >= window)
    out = (near + far) @ v / (near + far).sum(-1, keepdim=True)
    return layer.o(out.transpose(1, 2).flatten(2).float())  # type: ignore[no-any-return]


def test_a_window_keeps_the_softmax_of_the_near_keys() -> None:
    layer, x = _made()
    fast = _optimize(layer, x, feature="hedgehog", window=24, steps=8, length=4096)
    (site,) = fast.report.sites
    assert (site.status, site.rewrites, site.kernel) == ("rewritten", ("linearize",), "mixed")
    by_name = {name.split(".")[-1]: p.detach() for name, p in fast.named_parameters()}
    learned = [by_name[name] for name in ("query_map", "key_map", "balance")]
    assert_close(fast(x), _windowed(layer, x, 24, learned), atol=3e-6, rtol=0)
    fast.train()
    fast(x).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for name, p in fast.named_parameters() if name.startswith("attnopt."))
    whole = _optimize(layer, x, feature="elu", window=LONG, length=1 << 20)
    assert_close(whole(x), layer(x), atol=3e-6, rtol=0)


def test_a_window_needs_a_causal_mask() -> None:
    layer, x = _made(causal=False)
    fast = _optimize(layer, x, feature="elu", window=8, length=4096)
    assert [s.rewrites for s in fast.report.sites] == [()]
    assert any("needs a causal mask" in note for note in fast.report.notes)


def test_the_tolerance_refuses_and_leaves_nothing() -> None:
    layer, x = _made()
    fast = _optimize(layer, x, feature="hedgehog", steps=2, length=4096, tolerance=Tolerance(output=1e-6))
    (site,) = fast.report.sites
    assert site.rewrites == ()
    assert set(fast.state_dict()) == set(layer.state_dict())
    assert any("refused" in note for note in fast.report.notes)
    assert_close(fast(x), layer(x), atol=1e-5, rtol=0)


DECLINED = {
    "its score": {"change": lambda s: 5 * torch.tanh(s / 5)},
    "mask is neither": {"change": lambda s: s.masked_fill(torch.ones(LONG, LONG).triu(-20).tril() == 0, -torch.inf)},
}


@pytest.mark.parametrize("said", DECLINED)
def test_sites_that_do_not_fit_are_declined(said: str) -> None:
    layer, x = _made(**DECLINED[said])
    fast = _optimize(layer, x, feature="elu")
    assert [s.status for s in fast.report.sites] == ["fused"]
    assert any(said in note for note in fast.report.notes)
    assert_close(fast(x), layer(x), atol=1e-5, rtol=0)


def test_short_inputs_do_not_pay_unless_one_decides_for_long_ones() -> None:
    layer, x = _made(10)
    fast = _optimize(layer, x, feature="elu")
    assert [s.status for s in fast.report.sites] == ["fused"]
    assert any("would not pay" in note for note in fast.report.notes)
    fast = _optimize(layer, x, feature="elu", length=4096)
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    assert_close(fast(x), _by_hand(layer, "elu", x), atol=3e-6, rtol=0)


def test_sites_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).eval()
    x = torch.randn(1, LONG, INNER)
    fast = _optimize(model, x, feature="elu", sites=["1"])
    assert [s.status for s in fast.report.sites] == ["fused", "rewritten"]
    assert_close(fast(x), _by_hand(model[1], "elu", model[0](x)), atol=3e-6, rtol=0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no attention site '7'"):
        _optimize(model, x, feature="elu", sites=["7"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"feature": "cosine"}, "choose one of elu, relu, hedgehog"),
        ({"steps": 0}, "whole number of at least 1"),
        ({"length": 2.5}, "whole number"),
        ({"features": True}, "whole number"),
        ({"feature": "elu", "features": 4}, "belongs to learned maps"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Linearize(**arguments)
