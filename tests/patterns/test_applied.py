"""The contraction that applies the weights: which operand is which, and folded heads."""

from __future__ import annotations

import torch

from attnopt.errors import Decline
from attnopt.patterns.applied import apply, folded_heads, is_applying, sides
from attnopt.patterns.contraction import is_contraction
from tests.modules import captured

W, V = torch.randn(2, 4, 7, 9), torch.randn(2, 4, 9, 8)


def _node(run, *inputs):  # type: ignore[no-untyped-def]
    return captured(run, *inputs).gm.graph.output_node().args[0][0]


def test_dimensions_of_the_output() -> None:
    node = _node(torch.matmul, W, V)
    assert sides(node, lambda n: n.name == "args_0") == (2, 3, 0, 1)
    assert isinstance(sides(node, lambda n: True), Decline)
    assert isinstance(sides(node, lambda n: False), Decline)


def test_one_query_without_a_dimension() -> None:
    node = _node(lambda w, v: torch.einsum("bhk,bhkd->bhd", w, v), W[:, :, 0], V)
    assert sides(node, lambda n: n.name == "args_0") == (None, 2, 0, 1)


def test_other_operands_multiply_the_weights() -> None:
    node = _node(lambda w, v, g: torch.einsum("h,bhqk,bhkd->bhqd", g, w, v), W, V, torch.randn(4))
    site = apply(node, lambda n: n.name == "args_0", {}, None)
    assert not isinstance(site, Decline)
    assert str(site.weights) == "Load(args_2, h)*Load(args_0, b, h, q, k)"
    assert (site.values[0].name, site.frame.heads) == ("args_1", 4)


def test_heads_in_the_batch() -> None:
    assert folded_heads(_node(lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)), W, V)) == 4
    assert folded_heads(_node(torch.bmm, W[0], V[0])) is None


def test_what_adds_something_applies_no_weights() -> None:
    node = _node(lambda w, v: torch.addmm(v[0, 0, :7], w[0, 0], v[0, 0]), W, V)
    assert is_contraction(node)
    assert not is_applying(node)
