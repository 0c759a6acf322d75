"""Proofs carried over: to equal layers, and to none that differ in anything the proof has looked at."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.patterns import chunks, find
from attnopt.region import Region
from tests.modules import captured
from tests.spellings.chunks import BAND, LENGTH, gathered, sheared

QKV = tuple(torch.randn(2, 3, LENGTH, 4) for _ in range(3))
BIAS = torch.linspace(-1, 1, 5)


def _layer(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, drop: float = 0.0) -> Tensor:
    return gathered(F.dropout((sheared(q * 1.5, k) * scale).softmax(-1), drop), v)


def _other_bias(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return gathered((sheared(gathered((sheared(q, k) + x).softmax(-1), v), k) + y).softmax(-1), v)


ROWS: tuple[tuple[str, Callable[..., Tensor], tuple[str, str], int], ...] = (
    ("equal", lambda q, k, v: _layer(_layer(q, k, v), k, v), ("3/2*s", "3/2*s"), 1),
    ("swapped", lambda q, k, v: _layer(_layer(q, k, v), v, k), ("3/2*s", "3/2*s"), 2),
    ("scaled", lambda q, k, v: _layer(_layer(q, k, v, 2.0), k, v, 3.0), ("3*s", "9/2*s"), 2),
)  # fmt: skip


@pytest.mark.parametrize(("name", "run", "scores", "proofs"), ROWS, ids=[row[0] for row in ROWS])
def test_layers_are_read_as_they_are(
    name: str, run: Callable[..., Tensor], scores: tuple[str, str], proofs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, prove = [], chunks.prove
    monkeypatch.setattr(chunks, "prove", lambda *args: count.append(1) or prove(*args))
    regions = [found for _, _, found in find(captured(run, *QKV).gm.graph)]
    assert all(isinstance(region, Region) for region in regions)
    specs = [str(region.spec).split("score ")[1] for region in regions if isinstance(region, Region)]
    assert specs == [BAND.format(score).split("score ")[1] for score in scores]
    assert len(count) == proofs
    names = [region.value.node.name for region in regions if isinstance(region, Region)]
    assert names == (["args_2", "args_1"] if name == "swapped" else ["args_2", "args_2"])


def test_each_layer_loads_its_own_bias() -> None:
    graph = captured(_other_bias, *QKV, BIAS, BIAS.flip(0)).gm.graph
    regions = [found for _, _, found in find(graph)]
    loaded = [o.node for r in regions if isinstance(r, Region) for o in r.captures.values()]
    assert [str(node) for node in loaded] == ["args_3", "args_4"]
