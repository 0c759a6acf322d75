"""Inputs and outputs have the names of the user's model, dynamic sizes those that the user gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture import capture
from attnopt.onnx.naming import dimension_names, input_names, output_names, parameters, with_dimensions


class _Model(nn.Module):
    def forward(self, first: torch.Tensor, pair: Any, *, last: torch.Tensor) -> dict[str, Any]:
        x = first + pair[0] + last
        return {"sum": x, "parts": (x * 2, pair[1] + 1)}


def test_names_come_from_the_forward_and_the_result() -> None:
    x = torch.zeros(2, 3)
    captured = capture(_Model(), (x, [x + 1, x + 2]), {"last": x + 3})
    names = input_names(_Model(), captured.leaves)
    assert names == ["first", "pair_0", "pair_1", "last"]
    assert output_names(captured.out_spec, names) == ["sum", "parts_0", "parts_1"]
    assert parameters(_Model()) == ["first", "pair", "last"]


def test_a_bare_result_and_repeated_names_are_told_apart() -> None:
    assert output_names(pytree.tree_structure(0), []) == ["output"]
    assert output_names(pytree.tree_structure((0, 0)), []) == ["output_0", "output_1"]
    assert output_names(pytree.tree_structure({"x": 0}), ["x"]) == ["x_2"]


def test_names_of_sizes_are_found_where_the_user_gave_them() -> None:
    x = torch.zeros(2, 3)
    given = {"first": {0: "batch", 1: torch.export.Dim("tokens")}, "pair": [{0: "batch"}, None], "last": None}
    shapes = with_dimensions({**given, "pair": [{0: "batch", 1: "tokens"}] * 2, "last": {0: "batch", 1: "tokens"}})
    assert shapes["first"][0] is torch.export.Dim.DYNAMIC
    shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in ("first", "last")}
    shapes["pair"] = [{0: torch.export.Dim.DYNAMIC}] * 2
    inputs = ((x, [x + 1, x + 2]), {"last": x + 3})
    captured = capture(_Model(), *inputs, dynamic_shapes=shapes)
    names = dimension_names(given, (*inputs, parameters(_Model())), captured.leaves)
    assert set(names.values()) == {"batch"}
    assert names == {captured.leaves[0].sizes[0]: "batch"}
    assert dimension_names(None, (*inputs, []), captured.leaves) == {}
    listed = dimension_names(({0: "rows"}, None, None), (*inputs, parameters(_Model())), captured.leaves)
    assert set(listed.values()) == {"rows"}
