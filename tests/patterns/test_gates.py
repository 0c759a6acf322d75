"""The views after an attention, and the product that follows them."""

from __future__ import annotations

from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.capture import capture
from attnopt.patterns import find
from attnopt.patterns.gates import absorb, following, views_after
from attnopt.region import Region
from tests.forms import QKV, numbers, scores
from tests.modules import Function

G = numbers(2, 4, 7)


def region(after: Any) -> Region:
    """The one region of a softmax attention whose output `after` uses."""

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return after(scores(q, k).softmax(-1) @ v, g)

    (found,) = find(capture(Function(run), (*QKV, G), {}).gm.graph)
    assert isinstance(found[2], Region)
    return found[2]


VIEWS = (
    (lambda x, g: x.transpose(1, 2) + 1, (("b",), ("q",), ("h",), ("d",))),
    (lambda x, g: x.transpose(1, 2).reshape(2, 7, 32) + 1, (("b",), ("q",), ("h", "d"))),
    (lambda x, g: x.flatten(0, 1) + 1, (("b", "h"), ("q",), ("d",))),
    (lambda x, g: x.permute(3, 2, 1, 0).contiguous() + 1, (("d",), ("q",), ("h",), ("b",))),
    (lambda x, g: x[:, :, 1:] + 1, (("b",), ("h",), ("q",), ("d",))),
    (lambda x, g: x.double() + 1, (("b",), ("h",), ("q",), ("d",))),
)


@pytest.mark.parametrize(("after", "dims"), VIEWS, ids=range(len(VIEWS)))
def test_views_are_followed_while_every_element_stays(after: Any, dims: tuple[tuple[str, ...], ...]) -> None:
    node, found = views_after(region(after))
    assert found == dims
    assert node.meta["val"].numel() == 2 * 4 * 7 * 8


def test_the_factor_is_read_in_the_coordinates_of_the_site() -> None:
    given = region(lambda x, g: x.transpose(1, 2) * g.transpose(1, 2).unsqueeze(-1) * 3)
    scaled = following(given)
    assert scaled is not None
    assert scaled.dims == (("b",), ("q",), ("h",), ("d",))
    assert scaled.factor == ex.load("args_3", ex.b, ex.h, ex.q)
    merged = absorb(given, scaled)
    assert merged is not None
    assert merged.spec.gate == ex.load("gate", ex.b, ex.h, ex.q)
    assert merged.output is scaled.node
    assert [o.node.name for o in merged.captures.values()] == ["args_3"]
    again = following(merged)
    assert again is not None
    assert again.factor == sp.Integer(3)


@pytest.mark.parametrize(
    "after", [lambda x, g: x * x, lambda x, g: x + g[..., None], lambda x, g: x[:, :, :1] * 2], ids=range(3)
)
def test_nothing_follows(after: Any) -> None:
    assert following(region(after)) is None


def test_the_divisor_may_be_made_of_the_factor() -> None:
    given = region(lambda x, g: torch.div(x, g.unsqueeze(-1)))
    scaled = following(given)
    assert scaled is not None
    assert scaled.factor == 1 / ex.load("args_3", ex.b, ex.h, ex.q)
