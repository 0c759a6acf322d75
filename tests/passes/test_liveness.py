"""What stays computed beside fused sites, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnopt import PATTERNS, pipeline
from attnopt.graph import op_name
from attnopt.options import Options
from attnopt.passes.liveness import bystanders, live, used_elsewhere
from attnopt.region import Region
from tests.modules import Function, captured

X = torch.randn(2, 5, 8)
SOFTMAX = Options(patterns=tuple(p for p in PATTERNS if p.name == "softmax"))


def _plain(x: torch.Tensor) -> Any:
    return (x @ x.mT).softmax(-1) @ x


def _shared_scores(x: torch.Tensor) -> Any:
    scores = x @ x.mT
    return scores.softmax(-1) @ x, (scores / 2).softmax(-1) @ x


def _weights_returned(x: torch.Tensor) -> Any:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights.unsqueeze(1)


def _weights_logged(x: torch.Tensor) -> Any:
    scores = x @ x.mT / 3
    return scores.softmax(-1) @ x, scores.amax(-1), scores.amin(-1)


def _shape_read(x: torch.Tensor) -> Any:
    weights = (x @ x.mT).softmax(-1)
    return (weights @ x).reshape(weights.shape[0], -1)


def _found(run: Callable[..., Any], **dynamic: Any) -> tuple[Any, list[Region]]:
    graph = captured(run, X, **dynamic).gm.graph
    return graph, [f.result for f in pipeline.find(graph, {}, SOFTMAX) if isinstance(f.result, Region)]


@pytest.mark.parametrize("run", [_plain, _shared_scores, _shape_read])
def test_scores_that_only_fused_sites_use_are_gone(run: Callable[..., Any]) -> None:
    batch = {"dynamic_shapes": {"args": ({0: torch.export.Dim("n")},)}} if run is _shape_read else {}
    graph, regions = _found(run, **batch)
    assert regions
    assert used_elsewhere(graph, regions) == {}
    assert not [n for n in live(graph, regions) if op_name(n) == "aten::softmax"]


def test_scores_stay_where_one_of_two_sites_is_declined() -> None:
    graph, regions = _found(_shared_scores)
    used = used_elsewhere(graph, regions[:1])
    assert list(used) == [regions[0].anchor]
    assert "%matmul is also used by %div" in used[regions[0].anchor]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (_weights_returned, "%softmax is also used by the model's output, so it is"),
        (_weights_logged, "%div is also used by %amax ({line}), %amin ({line}), so it is"),
    ],
)
def test_who_uses_inner_values_is_named(run: Callable[..., Any], said: str) -> None:
    graph, regions = _found(run)
    (sentence,) = used_elsewhere(graph, regions).values()
    forward = Function.forward.__code__
    line = f"{forward.co_filename}:{forward.co_firstlineno + 1}"
    assert sentence == said.format(line=line) + " still computed beside the fused attention."


def test_bystanders_are_normalisers_that_nobody_took() -> None:
    graph, regions = _found(lambda x: (_plain(x), x.softmax(-1).topk(1).values, x.softmax(0)))
    found = dict(bystanders(graph, ["aten::softmax"], {r.anchor for r in regions}))
    assert [(n.name, why.split(": ")[1]) for n, why in found.items()] == [
        ("softmax_1", "its result goes to topk"),
        ("softmax_2", "its result goes to output"),
    ]
