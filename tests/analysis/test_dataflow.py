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
