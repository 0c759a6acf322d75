"""Exact: keys or values that are copied to query heads by a fixed table become a head map, and are not copied."""

from __future__ import annotations

from dataclasses import replace

from attnopt.graph import aten, is_call
from attnopt.passes.base import Rule
from attnopt.region import Operand, Region


def apply(region: Region) -> Region:
    """The region with the tables taken into its head maps; the same object if there are none."""
    if region.spec.select is not None and region.spec.select.shared:
        return region  # who shares a key head chooses together
    key, value, heads = region.key, region.value, region.spec.heads
    found = _table(key)
    if found is not None:
        key, table, count = found
        heads = replace(heads, k=count, k_map=tuple(table[i] for i in heads.k_map))
    found = _table(value)
    if found is not None:
        value, table, count = found
        heads = replace(heads, v=count, v_map=tuple(table[i] for i in heads.v_map))
    if key is region.key and value is region.value:
        return region
    return region.replace(key=key, value=value, spec=replace(region.spec, heads=heads))


def _table(operand: Operand) -> tuple[Operand, tuple[int, ...], int] | None:
    """The operand before the copy, the head that each copy is of, and how many heads there are."""
    node = operand.node
    if not is_call(node, aten.index_select.default) or "h" not in operand.dims:
        return None
    source, dim, index = node.args
    table, place = index.meta.get("attnopt_table"), operand.dims.index("h")
    if table is None or dim % len(operand.dims) != place:
        return None
    return replace(operand, node=source), table, max(table) + 1


RULE = Rule("shared_heads", apply)
