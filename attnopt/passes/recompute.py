"""Returned weights of a fused attention: made again, by a kernel, where the source keeps them for another user.

Exact: the weights are those of the same spec, from the maximum and the sum of each row that the fused attention found
beside its result. Without this the products, masks and the softmax of the source would run once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt.analysis.plain import weights_of
from attnopt.functional import WRITES
from attnopt.graph import is_pure, op_name, value
from attnopt.patterns.views import CASTS
from attnopt.region import Region
from attnopt.returns import AGAIN
from attnopt.spec import EmptyRow, Softmax

_NAME = "weights"


def wanted(region: Region, dtype: torch.dtype) -> list[fx.Node]:
    """The nodes that hold the weights and have users after the attention, which can take them from elsewhere.

    None where anything between the source and the region may have changed what they are weights of, or where a user
    stands before the attention's output. `dtype`: that of the fused attention.
    """
    known, spec = region.weights, region.spec
    if (
        known is None
        or region.merge
        or region.query_heads
        or (known.query, known.key_operand) != (region.query, region.key)
    ):
        return []
    plain = spec.normalizer == Softmax() and not spec.dropout and spec.select is None and spec.rows == sp.true
    # A row without keys that yields zeros has no such weights in a softmax: they were changed afterwards.
    if not plain or weights_of(spec).key != known.key or (spec.keep != sp.true and spec.empty_row is EmptyRow.ZERO):
        return []
    if value(known.node.args[0]).dtype != dtype:  # autocast, whose dtype the operator would take for the weights too
        return []
    found = []
    for node in _same(known.node, region):
        others = _outside(node, region)
        if node.meta.get(WRITES) or any(not region.output < user for user in others):
            return []
        if others:
            found.append(node)
    return found if all(value(node).dtype == dtype for node in found) else []


def _same(node: fx.Node, region: Region) -> Iterator[fx.Node]:
    """The weights and what is the same inside the region: cast, or past a dropout that is off."""
    queue = [node]
    while queue:
        current = queue.pop()
        yield current
        for user in current.users:
            same = op_name(user) in CASTS or (op_name(user) == "aten::dropout" and is_pure(user))
            if same and user in region.inner and user.args[0] is current and value(user).dtype.is_floating_point:
                queue.append(user)


def _outside(node: fx.Node, region: Region) -> list[fx.Node]:
    """Users that are no part of the region and lead somewhere."""
    return [u for u in node.users if u not in region.inner and (u.users or u.op == "output" or not is_pure(u))]


def text_of(region: Region) -> str:
    """The text of the spec that returns what weights are made of again."""
    return replace(region.spec, returns=AGAIN).text


def give(region: Region, nodes: list[fx.Node], call: fx.Node, rows: fx.Node, make: Callable[..., fx.Node]) -> None:
    """Let the users of the nodes take the weights that the operator makes. `make(target, *args)` inserts a call."""
    query, key, _, loaded, numbers, _ = call.args
    operator: Any = torch.ops.attnopt.attention_side.default
    made = make(operator, query, key, rows, loaded, numbers, weights_of(region.spec).text, _NAME)
    for node in nodes:
        made.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack")}
        for user in _outside(node, region):
            user.replace_input_with(node, made)
