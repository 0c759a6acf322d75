"""Sites are judged one by one, on copies of what the graph writes to."""

from __future__ import annotations

import torch

from attnopt import pipeline
from attnopt.nested import copied
from attnopt.options import Options
from attnopt.validation import validate_graphs
from tests.modules import captured

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def _run(x: torch.Tensor) -> torch.Tensor:
    out = (x @ x.mT).softmax(-1) @ x
    x.add_(1)
    return out


def test_figures_of_a_right_kernel_and_inputs_untouched() -> None:
    graph = captured(lambda x: (x @ x.mT).softmax(-1) @ x, X)
    original = copied(graph.gm)
    found = pipeline.lower(graph.gm, pipeline.find(graph.gm.graph, {}, Options()))
    failed, errors, figures = validate_graphs(original, graph.gm, found, [X], Options())
    assert not failed
    assert set(errors["softmax"]) == {"max", "rms", "eager_max", "eager_rms"}
    assert figures["validation"]["change_max"] < 1e-5 * figures["validation"]["output_rms"] + 1e-5


def test_validation_writes_to_copies() -> None:
    x = X.clone()
    graph = captured(_run, x.clone())
    original = copied(graph.gm)
    found = pipeline.lower(graph.gm, pipeline.find(graph.gm.graph, {}, Options()))
    validate_graphs(original, graph.gm, found, [x], Options())
    assert torch.equal(x, X)
