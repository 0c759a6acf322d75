"""Agent attention: tokens gather from the keys, then hand on to the queries. Two sites that the report names as one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from attnopt.graph import op_name
from attnopt.patterns.gates import views_after
from attnopt.patterns.views import VIEWS
from attnopt.region import Region


def agents(regions: Iterable[Region]) -> set[fx.Node]:
    """Anchors of both halves of every agent attention: what gathers is what the other half's queries attend to."""
    found = list(regions)
    made = {views_after(region)[0]: region for region in found} | {region.output: region for region in found}
    out: set[fx.Node] = set()
    for second in found:
        first = made.get(second.value.node) or made.get(_base(second.value.node))
        if first is not None and first is not second and _base(first.query.node) is _base(second.key.node):
            out |= {first.anchor, second.anchor}
    return out


def _base(node: fx.Node) -> fx.Node:
    """The tensor behind views."""
    while op_name(node) in VIEWS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
