"""Questions about a region's dataflow, answered on a graph of names by networkx. Free of torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import networkx as nx


class Dataflow:
    """A graph of values; an edge goes from a value to what is computed from it."""

    def __init__(self, edges: Iterable[tuple[Hashable, Hashable]]) -> None:
        self.graph = nx.DiGraph()
        self.graph.add_edges_from(edges)

    def between(self, sources: Iterable[Hashable], sink: Hashable) -> set[Hashable]:
        """Everything on a path from a source to the sink, the sink included and the sources not."""
        start = [s for s in sources if s in self.graph]
        if sink not in self.graph:
            return set()
        above = nx.ancestors(self.graph, sink) | {sink}
        below: set[Hashable] = set()
        for source in start:
            below |= nx.descendants(self.graph, source)
        inner: set[Hashable] = (above & below) - set(start)
        return inner

    def escapes(self, inner: set[Hashable], sink: Hashable) -> list[Hashable]:
        """Inner values other than the sink that something outside uses, in order of computation."""
        found = {x for x in inner if x != sink and any(user not in inner for user in self.graph.successors(x))}
        return [x for x in nx.lexicographical_topological_sort(self.graph.subgraph(inner), key=str) if x in found]

    def convex(self, inner: set[Hashable]) -> bool:
        """Whether no path leaves the set and comes back, so that it can be computed as one step."""
        out = {user for x in inner for user in self.graph.successors(x)} - inner
        return not any(nx.descendants(self.graph, x) & inner for x in out)

    def dominates(self, root: Hashable, gate: Hashable, node: Hashable) -> bool:
        """Whether every path from the root to the node passes the gate."""
        above = nx.immediate_dominators(self.graph, root)
        while node in above and node != root and node != gate:
            node = above[node]
        return node == gate
