"""Which parameter rows make each head, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.errors import Decline
from attnopt.patterns import find, projections
from attnopt.patterns.projections import Projections
from attnopt.region import Region
from tests.passes.tiny import HEADS, INNER, KV, WIDTH, captured, model


def _found(layout: str, **options: object) -> Projections | Decline:
    module, x = model(layout, **options)
    ((_, _, region),) = find(captured(module, x).gm.graph)
    assert isinstance(region, Region), str(region)
    return projections.find(region)


def _block(start: int, heads: int, step: int = WIDTH) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(start + h * step, start + h * step + WIDTH)) for h in range(heads))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    ("layout", "q", "k", "v"),
    [
        ("separate", _block(0, HEADS), _block(0, HEADS), _block(0, HEADS)),
        ("concatenated", _block(0, HEADS), _block(INNER, HEADS), _block(2 * INNER, HEADS)),
        ("conv", _block(0, HEADS), _block(INNER, HEADS), _block(2 * INNER, HEADS)),
        ("interleaved", *(_block(i * WIDTH, HEADS, 3 * WIDTH) for i in range(3))),
        ("grouped", _block(0, HEADS), _block(0, KV), _block(0, KV)),
        ("grouped-fused", _block(0, HEADS), _block(INNER, KV), _block(INNER + KV * WIDTH, KV)),
        ("shared-kv", _block(0, HEADS), _block(INNER, 1), _block(INNER + WIDTH, 1)),
    ],
)
def test_rows_of_every_layout(layout: str, rotary: bool, q: object, k: object, v: object) -> None:
    found = _found(layout, rotary=rotary)
    assert isinstance(found, Projections), str(found)
    assert found.q.rows == q
    assert found.k.rows == k
    assert found.v.rows == v
    assert found.o.rows == _block(0, HEADS)
    assert found.q.transposed == (layout == "conv")
    assert (found.q.node is found.v.node) == (layout not in ("separate", "grouped"))


def test_bias_and_weight_are_the_parameters_placeholders() -> None:
    found = _found("separate")
    assert isinstance(found, Projections)
    assert [found.q.weight.op, found.q.bias and found.q.bias.op] == ["placeholder", "placeholder"]
    assert found.q.weight is not found.k.weight
    assert _found("grouped").k.bias is None  # type: ignore[union-attr]


def test_a_norm_of_each_head_keeps_heads_apart() -> None:
    found = _found("separate", norm="head", rotary=True)
    assert isinstance(found, Projections), str(found)
    assert found.q.rows == _block(0, HEADS)


def test_a_norm_over_all_heads_is_declined() -> None:
    found = _found("separate", norm="whole")
    assert isinstance(found, Decline)
    assert "query heads share rows" in found.reason


def test_weights_used_twice_are_declined() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, _ = model("separate")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner(x))

    x = torch.randn(1, 5, INNER, dtype=torch.float64)
    for _, _, region in find(captured(Twice(), x).gm.graph):
        found = projections.find(region)  # type: ignore[arg-type]
        assert isinstance(found, Decline)
        assert "used in another place" in found.reason


def test_queries_without_a_linear_map_are_declined() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    ((_, _, region),) = find(captured(Bare(), torch.randn(1, HEADS, 5, WIDTH)).gm.graph)
    found = projections.find(region)  # type: ignore[arg-type]
    assert isinstance(found, Decline)
    assert "made by no linear map" in found.reason
