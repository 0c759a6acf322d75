"""Questions about a region's dataflow, answered on a graph of names by networkx. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import networkx as nx

Neighbours = Callable[[Any], Iterable[Any]]


class Dataflow:
    """A graph of values; an edge goes from a value to what is computed from it."""

    def __init__(self, edges: Iterable[tuple[Hashable, Hashable]]) -> None:
        self.graph = nx.DiGraph()
        self.graph.add_edges_from(edges)

    @classmethod
    def around(
        cls, sources: Iterable[Any], sink: Any, inputs: Neighbours, users: Neighbours, given: Iterable[Any] = ()
    ) -> Dataflow:
        """The part of a large graph from which the sink is computed, and who uses what lies there.

        Nothing is followed beyond the sources and what is `given`. Values must compare by order of computation
        (`a < b`: a is computed first). The walks down from the sources and up from the sink take turns and the first
        to end decides, so that the cost is that of the smaller, whatever the size of the graph.
        """
        start = set(sources)
        first, known = min(start), start | set(given)

        def above(x: Any) -> Iterable[Any]:
            return () if x in known else inputs(x)

        down = _Cone(start, users, lambda x: not sink < x)
        up = _Cone({sink}, above, lambda x: not x < first)
        while down.step() and up.step():
            pass
        if not down.waiting:
            up = _Cone({sink}, above, down.seen.__contains__)
            while up.step():
                pass
        own = up.seen - known
        return cls([*((x, n) for n in own for x in inputs(n)), *((n, user) for n in own for user in users(n))])

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


class _Cone:
    """A walk from some values along one direction, an edge a step, as far as a limit allows."""

    def __init__(self, start: set[Any], following: Neighbours, allowed: Callable[[Any], bool]) -> None:
        self.seen = set(start)
        # In order of computation: the last source, most often the nearest to the sink, is followed first.
        self.waiting = [iter(following(x)) for x in sorted(start)]
        self.following = following
        self.allowed = allowed

    def step(self) -> bool:
        """Follow one edge. False when all were followed."""
        for x in self.waiting[-1] if self.waiting else ():
            if x not in self.seen and self.allowed(x):
                self.seen.add(x)
                self.waiting.append(iter(self.following(x)))
            return True
        del self.waiting[-1:]
        return bool(self.waiting)
