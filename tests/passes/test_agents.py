"""Agent attention is two fused sites with one name."""

from __future__ import annotations

from torch import Tensor

import attnopt
from attnopt import pipeline
from tests.forms import QKV, alike, scores
from tests.modules import Function, captured


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def agent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.unfold(2, 2, 2).mean(-1)
    return attend(q, tokens, attend(tokens, k, v))


def names(run: object) -> list[tuple[str, str]]:
    fast = attnopt.optimize(Function(run), QKV, options=attnopt.Options(kernel="reference"))
    return [(site.status, site.form) for site in fast.report.sites]


def test_both_halves_are_fused_and_named() -> None:
    assert names(agent) == [("fused", "agent")] * 2
    fast = attnopt.optimize(Function(agent), QKV, validate=False, options=attnopt.Options(kernel="reference"))
    alike(Function(agent), fast, QKV)


def test_the_source_of_the_first_half_is_gone() -> None:
    graph = captured(agent, *QKV)
    pipeline.lower(graph.gm, pipeline.find(graph.gm.graph, graph.scalars, attnopt.Options()))
    assert graph.gm.code.count("attnopt.attention") == 2
    assert "aten.softmax" not in graph.gm.code
    assert "matmul" not in graph.gm.code


def test_two_layers_are_no_agents() -> None:
    assert names(lambda q, k, v: attend(attend(q, k, v), k, v)) == [("fused", "softmax")] * 2
    assert names(lambda q, k, v: attend(q, k[:, :, :7], attend(q, k, v))) == [("fused", "softmax")] * 2
