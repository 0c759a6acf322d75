"""Convexity, escapes, dominance and paths on small graphs."""

from __future__ import annotations

from attnopt.analysis.dataflow import Dataflow

DIAMOND = Dataflow([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "e"), ("b", "x")])


def test_between_is_what_lies_on_paths() -> None:
    assert DIAMOND.between({"a"}, "d") == {"b", "c", "d"}
    assert DIAMOND.between({"b"}, "e") == {"d", "e"}
    assert DIAMOND.between({"missing"}, "d") == set()
    assert DIAMOND.between({"a"}, "missing") == set()


def test_escapes_are_used_elsewhere() -> None:
    assert DIAMOND.escapes({"b", "c", "d"}, "d") == ["b"]
    assert DIAMOND.escapes({"c", "d"}, "d") == []


def test_convex_sets_have_no_way_out_and_back() -> None:
    assert DIAMOND.convex({"a", "b", "c", "d"})
    assert DIAMOND.convex({"b", "c"})
    assert not DIAMOND.convex({"a", "b", "d"})


def test_dominance() -> None:
    assert DIAMOND.dominates("a", "d", "e")
    assert not DIAMOND.dominates("a", "b", "d")
    assert DIAMOND.dominates("a", "a", "e")


EDGES = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "e"), ("b", "x"), ("e", "f"), ("f", "g")]


def _around(sources: str, sink: str, given: str = "", edges: list[tuple[str, str]] = EDGES) -> tuple[Dataflow, int]:
    """The part around a sink, and how many values were visited to find it."""
    visited: set[str] = set()

    def inputs(x: str) -> list[str]:
        visited.add(x)
        return [a for a, b in edges if b == x]

    def users(x: str) -> list[str]:
        visited.add(x)
        return [b for a, b in edges if a == x]

    return Dataflow.around(sources, sink, inputs, users, given), len(visited)


def test_the_part_around_a_sink_answers_like_the_whole() -> None:
    for sources, sink in (("a", "d"), ("b", "e"), ("bc", "d"), ("d", "g")):
        part, _ = _around(sources, sink)
        whole = Dataflow(EDGES)
        inner = part.between(sources, sink)
        assert inner == whole.between(sources, sink)
        assert part.escapes(inner, sink) == whole.escapes(inner, sink)


def test_nothing_is_followed_beyond_what_is_given() -> None:
    part, _ = _around("a", "e", given="d")
    assert part.between("a", "e") == set(), "nothing but the given value makes it"
    part, _ = _around("a", "e", given="c")
    assert part.between("a", "e") == {"b", "d", "e"}


def test_the_cost_is_that_of_the_smaller_walk() -> None:
    line = [(f"{i:03}", f"{i + 1:03}") for i in range(200)]
    # Sources and sink close to one another, at either end of a long chain, and a source that everything uses.
    assert _around(["003"], "006", edges=line)[1] < 20
    assert _around(["190"], "193", edges=line)[1] < 20
    early = [*line, *(("000", f"{i:03}") for i in range(2, 201))]
    assert _around(["000", "189"], "193", "190", edges=early)[1] < 20
