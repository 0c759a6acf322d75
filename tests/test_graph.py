"""The normal form and the helpers that read it."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.graph import arguments, drop_dead_code, is_call, is_pure, module_path, normalize, source_line, value
from tests.modules import SelfAttention, captured, replay

aten = torch.ops.aten
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_no_grad_regions_are_inlined_and_detached() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x

    graph = captured(run, X)
    assert not [n for n in graph.gm.graph.nodes if "set_grad" in str(n.target)]
    x = X.clone().requires_grad_()
    replay(graph, x)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(X))  # type: ignore[arg-type]


def test_users_that_a_trace_lost_are_found_again() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    lost, other = graph.call_function(aten.neg.default, (x,)), graph.call_function(aten.abs.default, (x,))
    graph.output((other,))
    for node in graph.nodes:
        node.meta["val"] = X
    del x.users[lost]
    other.users[lost] = None
    gm = normalize(fx.GraphModule(torch.nn.Module(), graph))
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert list(x.users) == [other]


def test_arguments_by_name_with_defaults() -> None:
    (node,) = [n for n in captured(lambda x: x.softmax(-1), X).gm.graph.nodes if is_call(n, aten.softmax.int)]
    a = arguments(node)
    assert a["dim"] == -1
    assert a["dtype"] is None
    assert value(node).shape == (2, 5, 16)
    assert value(3) == 3


class _Caller(torch.nn.Module):
    """A module around one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0]


def test_module_paths_of_dynamo_whatever_self_is_called() -> None:
    node = torch.fx.Graph().placeholder("x")
    for name in ("L['self'].layers.0", "L['model'].layers.0", "layers.0", "L__self___layers.0"):
        node.meta["nn_module_stack"] = {"key": (name, torch.nn.Module)}
        assert module_path(node) == "layers.0"
    node.meta["nn_module_stack"] = {"key": ("L['self']", torch.nn.Module)}
    assert module_path(node) == ""


def test_where_a_node_comes_from() -> None:
    import attnopt

    (site,) = attnopt.explain(SelfAttention().eval(), (X,)).sites
    assert site.source.rpartition(":")[0].endswith("modules.py")
    (site,) = attnopt.explain(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), (X,)).sites
    assert "torch" in site.source, "where all the code is torch's own"
    (site,) = attnopt.explain(_Caller().eval(), (X,)).sites
    line = _Caller.forward.__code__.co_firstlineno + 1
    assert site.source.endswith(f"test_graph.py:{line}"), "and not torch's line inside"
    graph = captured(lambda x: x + 1, X).gm.graph
    placeholder = next(iter(graph.nodes))
    assert module_path(placeholder) == ""
    assert source_line(placeholder) is None


def test_dead_code_goes_and_effects_stay() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.mul.Tensor, (x, 2))
    kept = [graph.call_function(aten.add_.Tensor, (x, 1)), graph.call_function(aten.rand_like.default, (x,))]
    graph.call_function(aten.dropout.default, (x, 0.5, False))
    graph.output((x,))
    drop_dead_code(graph)
    assert [n for n in graph.nodes if n.op == "call_function"] == kept


def test_attention_that_drops_nothing_is_pure() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = [
        graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (x, x, x, None, rate))
        for rate in (0.0, 0.5)
    ]
    assert [is_pure(call) for call in calls] == [True, False]


def test_empty_tensors_of_one_dimension_are_no_part_of_a_cat() -> None:
    graph = captured(lambda x: (torch.cat([torch.tensor([]), x], -1), torch.cat([torch.tensor([]), x[0, 0]])), X)
    kept = [n.args[0] for n in graph.gm.graph.nodes if is_call(n, aten.cat.default)]
    assert [len(parts) for parts in kept] == [1, 2], "beside vectors an empty one is a part like any other"
    found = replay(graph, X)
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], X[0, 0])
