"""Finding and lowering grow linearly with the depth of a model: executed lines are counted, not seconds."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnopt import PATTERNS, pipeline
from attnopt import expr as ex
from attnopt.graph import op_name
from attnopt.options import Options
from attnopt.region import Region
from attnopt.runtime import dispatch
from tests.modules import captured

SOFTMAX = Options(patterns=tuple(p for p in PATTERNS if p.name == "softmax"))
X, BIAS, WEIGHT = torch.randn(2, 6, 4, 8), torch.randn(4, 6, 6), torch.randn(8, 8) / 4


def _self(x: Tensor, other: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    y = torch.layer_norm(x, (8,))
    q, k = (y @ weight).transpose(1, 2) * 0.5, (y @ weight.T).transpose(1, 2)
    n = torch.arange(6)
    scores = (q @ k.mT + bias).masked_fill(n[None, :] > n[:, None], float("-inf"))
    mixed = (scores.softmax(-1) @ k).transpose(1, 2).reshape(2, 6, 32)
    return x + mixed.view(2, 6, 4, 8)  # a view is what lowering looks for behind a site


def _cross(x: Tensor, other: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    """Keys that every layer takes from the same early tensor."""
    q, k = (torch.layer_norm(x, (8,)) @ weight).transpose(1, 2), other.transpose(1, 2)
    return x + ((q @ k.mT / 3).softmax(-1) @ k).transpose(1, 2)


def chained(run: Callable[..., Tensor], times: int) -> fx.GraphModule:
    """The graph of one layer, `times` times in a row; captured once, whatever the depth."""
    layer = captured(run, X, X, BIAS, WEIGHT).gm.graph
    graph, env = fx.Graph(), {}
    inputs = [n for n in layer.nodes if n.op == "placeholder"]
    for node in inputs:
        env[node] = graph.node_copy(node)
    env[inputs[-1]].target = "p_weight"  # by its name a parameter, which is no activation
    for _ in range(times):
        for node in layer.nodes:
            if node.op == "call_function":
                env[node] = graph.node_copy(node, env.__getitem__)
        (result,) = next(n for n in layer.nodes if n.op == "output").args[0]
        first = next(n for n in inputs if n.users)
        env[first] = env[result]
    graph.output((env[first],))
    return fx.GraphModule({}, graph)


def lines(run: Callable[[], Any]) -> Counter[str]:
    """How many lines of each function of attnopt and of networkx are executed."""
    count: Counter[str] = Counter()

    def line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            count[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return line if "attnopt" in name or "networkx" in name else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("run", [_self, _cross])
def test_later_layers_cost_what_earlier_ones_do(run: Callable[..., Tensor]) -> None:
    def work(times: int) -> Counter[str]:
        gm = chained(run, times)
        found: list[Any] = []
        count = lines(lambda: found.extend(pipeline.find(gm.graph, {}, Options())))
        assert sum(op_name(f.anchor) == "aten::softmax" and isinstance(f.result, Region) for f in found) == times
        return count + lines(lambda: pipeline.lower(gm, found))

    work(2)  # fills the caches of what does not depend on the layer
    small, middle, large = work(4), work(8), work(12)
    # A walk over the graph for each site makes the last third of the layers cost 5/3 of the second. Walks of a few
    # dozen steps, which are allowed, have not all reached their full length in the first layers.
    grown = {
        name: (middle[name] - small[name], lines - middle[name])
        for name, lines in large.items()
        if lines - middle[name] > 1.5 * (middle[name] - small[name]) + 0.0005 * large.total()
    }
    assert not grown, "these functions walk the whole graph for each site"
    assert large.total() - middle.total() < 1.05 * (middle.total() - small.total())


def test_equal_layers_share_one_spec_and_one_kernel(tmp_path: Any) -> None:
    gm = chained(_self, 6)
    options = Options(cache_dir=str(tmp_path), kernel="reference", patterns=SOFTMAX.patterns)
    found = pipeline.lower(gm, pipeline.find(gm.graph, {}, options))
    assert len({f.result.spec.text for f in found if isinstance(f.result, Region)}) == 1
    x, bias, weight = X.double(), BIAS.double(), WEIGHT.double()
    expected = x
    for _ in range(6):
        expected = _self(expected, x, bias, weight)
    with dispatch.use(options) as active:
        (result,) = gm(x, x, bias, weight)
        assert len(active.sites) == 1
    torch.testing.assert_close(result, expected)


def test_canonical_forms_are_made_once_for_equal_layers() -> None:
    """What a layer adds are its own names; the forms behind them are known."""

    def misses(times: int) -> int:
        ex._canon.cache_clear()
        gm = chained(_self, times)
        pipeline.find(gm.graph, {}, SOFTMAX)
        return int(ex._canon.cache_info().misses)

    one, two, three = misses(1), misses(2), misses(3)
    assert three - two <= two - one
    assert two - one <= one / 2
