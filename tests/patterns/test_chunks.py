"""Sliding chunks as regions: the specs, sixteen bits, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.errors import Decline
from attnopt.patterns.chunks import match
from attnopt.patterns.known import Known
from attnopt.region import Region
from tests.modules import captured
from tests.spellings.chunks import BAND, LENGTH, PADDED, gathered, sheared

QKV = tuple(torch.randn(2, 3, LENGTH, 4) for _ in range(3))


def _match(run: Callable[..., Tensor], *inputs: Tensor, **dynamic: Any) -> Any:
    (softmax,) = (n for n in captured(run, *inputs, **dynamic).gm.graph.nodes if n.name == "softmax")
    return match(softmax, Known({}))


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gathered(sheared(q, k).softmax(-1), v)


def test_the_region_reads_the_tensors_themselves() -> None:
    found = _match(_plain, *QKV)
    assert isinstance(found, Region)
    assert str(found.spec) == BAND.format("s")
    assert [operand.node.name for operand in (found.query, found.key, found.value)] == ["args_0", "args_1", "args_2"]
    assert found.pattern == "chunks"
    assert not found.captures


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_bias_by_distance_is_loaded_by_distance(scale: float) -> None:
    bias = torch.linspace(-1, 1, 5)
    found = _match(lambda q, k, v, x: gathered((sheared(q, k) * scale + x).softmax(-1), v), *QKV, bias)
    assert isinstance(found, Region)
    assert str(found.spec) == BAND.format(f"{'4*' if scale > 1 else ''}s + bias[k - q + 2]")


def test_a_fill_in_sixteen_bits_rounds_what_it_is_added_to() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        gone = (mask != 0)[:, None, :, None]
        fill = gone.to(q.dtype).masked_fill(gone, torch.finfo(q.dtype).min)
        return gathered((sheared(q, k) + sheared(torch.ones_like(fill), fill)).softmax(-1), v)

    found = _match(run, *[x.half() for x in QKV], PADDED)
    assert isinstance(found, Region)
    assert str(found.spec) == BAND.format("where(bias[b, k] == 0, s, snap(s, 32) - 65504)")


def test_lengths_that_vary_are_declined_with_the_reason() -> None:
    length = torch.export.Dim("n", min=1, max=8)
    shape = {2: 4 * length}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.pad((q @ k.mT).softmax(-1), (0, 1))
        return weights @ F.pad(v, (0, 0, 0, 1))

    found = _match(run, *QKV, dynamic_shapes={"args": (shape, shape, shape)})
    assert isinstance(found, Decline)
    assert "sizes are not known" in found.reason


def test_a_router_is_no_site() -> None:
    def run(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.pad(F.linear(x, w).softmax(-1), (0, 1)) @ v

    assert _match(run, torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(6, 7)) is None
