"""Calls of the operator in a graph become modules: eager they are the reference, exported what was chosen."""

from __future__ import annotations

import torch
from torch import nn

from attnopt import pipeline
from attnopt.capture import capture
from attnopt.onnx.operators import REFERENCE
from attnopt.onnx.sites import Attention, install
from attnopt.options import Options
from attnopt.spec import AttentionSpec, Heads
from tests.onnx.sites import of_case, site
from tests.specs import CASES


class _Model(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own = torch.softmax(q @ q.transpose(-1, -2), -1) @ q
        return own + torch.softmax(q @ k.transpose(-1, -2), -1) @ k


def _installed(shapes: object = None) -> tuple[torch.fx.GraphModule, list[Attention], list[torch.Tensor]]:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)]
    captured = capture(_Model(), tuple(inputs), {}, shapes)
    pipeline.lower(captured.gm, pipeline.find(captured.gm.graph, {}, Options()))
    return captured.gm, install(captured.gm, "ort", 23), inputs


def test_every_call_is_replaced_and_records_its_operands() -> None:
    gm, sites, inputs = _installed()
    assert len(sites) == 2
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.attnopt.attention.default]
    torch.testing.assert_close(gm(*inputs)[0], _Model()(*inputs))
    assert sites[1].seen.tensors[1].data_ptr() == inputs[1].data_ptr()
    assert all(s.anchor in {"softmax", "softmax_1"} for s in sites)


def test_equal_lengths_are_known_only_where_they_are_one_size() -> None:
    varies = torch.export.Dim.DYNAMIC
    _, sites, _ = _installed({"q": {2: varies}, "k": {2: varies}})
    assert sorted((s.shape.square, s.shape.covered) for s in sites) == [(False, False), (True, True)]
    _, sites, _ = _installed()
    assert all(s.shape.square for s in sites)


def test_reasons_gather_until_the_reference_graph_is_left() -> None:
    made = site(AttentionSpec(Heads(4, 4, 4, 8, 8)), target="ort")
    names = []
    while made.operator is not None:
        names.append(made.kernel)
        made.next("it was wrong")
    assert names == ["com.microsoft.MultiHeadAttention", "ai.onnx.Attention-23"]
    assert made.kernel == REFERENCE
    assert [r for r in made.reasons if r.endswith(": it was wrong")] == made.reasons[-2:]


def test_groups_tell_specs_shapes_and_operators_apart() -> None:
    case = next(c for c in CASES if c.name == "gqa")
    one, same, other = (of_case(case, 9, n, "onnx") for n in (9, 9, 12))
    assert one.group == same.group != other.group
    same.next("wrong")
    assert one.group != same.group
