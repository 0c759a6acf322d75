"""Found, lowered, dumped."""

from __future__ import annotations

from pathlib import Path

import torch

import attnopt
from attnopt import pipeline
from attnopt.options import Options
from attnopt.region import Region
from tests.modules import captured, replay

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def _run(x: torch.Tensor) -> torch.Tensor:
    return (x @ x.mT).softmax(-1) @ x


def test_finding_changes_nothing_and_lowering_replaces_the_site() -> None:
    graph = captured(_run, X)
    before = str(graph.gm.graph)
    (found,) = pipeline.find(graph.gm.graph, graph.scalars, Options())
    assert str(graph.gm.graph) == before
    assert isinstance(found.result, Region)
    (site,) = [f.site() for f in pipeline.lower(graph.gm, [found])]
    assert site.status == "fused"
    targets = [n.target for n in graph.gm.graph.nodes]
    assert torch.ops.attnopt.attention.default in targets
    assert torch.ops.aten.softmax.int not in targets
    torch.testing.assert_close(replay(graph, X)[0], _run(X))


def test_disabled_finds_nothing() -> None:
    graph = captured(_run, X)
    assert pipeline.find(graph.gm.graph, {}, Options(disable=True)) == []


def test_a_dump_shows_the_graph_and_the_sites(tmp_path: Path) -> None:
    from tests.modules import Function

    attnopt.optimize(Function(_run), (X,), options={"dump": str(tmp_path)})
    assert "softmax" in (tmp_path / "00_captured_graph.py").read_text()
    assert "score s" in (tmp_path / "01_lowered_sites.txt").read_text()
