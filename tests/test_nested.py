"""Bodies of higher-order operators: found, copied, named apart; and which precision holds where."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from attnopt.dynamo import retrace
from attnopt.nested import AUTOCAST, Replay, bodies, copied, everywhere
from tests.modules import captured

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
HALF = {"cpu": torch.bfloat16}


def _region(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: (x * 2) @ x, (x,))
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ y.float()
    return z + (x @ x)


def _wrapped(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x
    with torch.autocast("cpu", enabled=False):
        return y.float() @ x


def _calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def test_every_body_is_found_once_with_its_caller() -> None:
    gm = captured(_region, X).gm
    yes, no = bodies(gm)
    assert yes.call is no.call
    assert yes.call.target is torch.ops.higher_order.cond
    assert all(getattr(gm, body.name) is body.gm and not body.closed for body in (yes, no))
    assert [b.call.target.name() for b in everywhere(captured(_wrapped, X).gm)] == ["wrap_with_autocast"] * 2


def test_a_module_without_a_graph_has_no_bodies() -> None:
    assert list(everywhere(None)) == list(everywhere(torch.nn.Linear(2, 2))) == []


def test_names_are_unique_across_bodies() -> None:
    gm = captured(_region, X).gm
    names = [n.name for m in (gm, *(b.gm for b in everywhere(gm))) for n in m.graph.nodes if n.op == "call_function"]
    assert len(names) == len(set(names))


def test_a_copy_has_bodies_of_its_own() -> None:
    gm = captured(_region, X).gm
    copy = copied(gm)
    for mine, theirs in zip(everywhere(gm), everywhere(copy), strict=True):
        assert mine.gm is not theirs.gm
        assert [n.name for n in mine.gm.graph.nodes][:-1] == [n.name for n in theirs.gm.graph.nodes][:-1]
    before = copy(X)[0]
    for body in everywhere(gm):
        for node in _calls(body.gm, torch.ops.aten.mul.Tensor):
            node.args = (node.args[0], 5)
        body.gm.recompile()
    torch.testing.assert_close(copy(X)[0], before)


def test_an_unknown_operator_closes_its_bodies() -> None:
    gm = captured(_region, X).gm
    (call,) = _calls(gm, torch.ops.higher_order.cond)
    call.target = torch.ops.higher_order.strict_mode
    assert all(b.closed == "attention inside strict_mode stays as it is" for b in everywhere(gm))


@pytest.mark.parametrize(("run", "count"), [(_region, 4), (_wrapped, 2)])
def test_precision_is_marked_where_it_holds(run: Callable[..., Tensor], count: int) -> None:
    gm = captured(run, X).gm
    products = [n for m in (gm, *(b.gm for b in everywhere(gm))) for n in _calls(m, torch.ops.aten.matmul.default)]
    assert len(products) == count
    for node in products:
        held = node.meta.get(AUTOCAST, {})
        assert held == (HALF if node.meta["val"].dtype == torch.bfloat16 else {})
    assert {n.meta["val"].dtype for n in products} == {torch.bfloat16, torch.float32}


def _flat() -> fx.GraphModule:
    """A graph with a region as Dynamo writes it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    enter = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    inside = graph.call_function(torch.matmul, (x, x))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (enter,))
    graph.output((inside, graph.call_function(torch.matmul, (x, x))))
    return fx.GraphModule({}, graph)


def test_a_replayed_region_is_in_force_and_stays_in_the_graph() -> None:
    square = torch.eye(4)
    traced = retrace(_flat(), [square])
    inside, outside = _calls(traced, torch.ops.aten.matmul.default)
    assert (inside.meta["val"].dtype, outside.meta["val"].dtype) == (torch.bfloat16, torch.float32)
    assert (inside.meta.get(AUTOCAST), outside.meta.get(AUTOCAST)) == (HALF, None)
    assert [x.dtype for x in traced(square)] == [torch.bfloat16, torch.float32]


def test_an_error_inside_a_region_closes_it() -> None:
    with pytest.raises(RuntimeError):
        Replay(_flat()).run(torch.zeros(2, 3))
    assert not torch.is_autocast_enabled("cpu")


def test_a_checkpoint_is_retraced_without_a_warning_and_runs(caplog: pytest.LogCaptureFixture) -> None:
    body = fx.Graph()
    x = body.placeholder("x")
    body.output((body.call_function(torch.sin, (x,)),))
    graph = fx.Graph()
    given, held = graph.placeholder("x"), graph.get_attr("body")
    call = graph.call_function(
        torch.ops.higher_order.tag_activation_checkpoint, (held, given), {"use_reentrant": False}
    )
    graph.output((graph.call_function(lambda pair: pair[0], (call,)),))
    with caplog.at_level(logging.WARNING):
        traced = retrace(fx.GraphModule({"body": fx.GraphModule({}, body)}, graph), [X])
        torch.testing.assert_close(traced(X)[0], X.sin())
    assert not caplog.records
    (inner,) = everywhere(traced)
    assert "_checkpoint_context_fn" not in inner.gm.meta
