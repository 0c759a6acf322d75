"""Answers about nodes are right, are asked for once in a search, and do not outlive it."""

from __future__ import annotations

from torch import fx

from attnopt.patterns.memo import behind, searching


def _graph(length: int) -> tuple[list[fx.Node], fx.Node]:
    """A chain from one input, where a second input joins in the middle."""
    graph = fx.Graph()
    first, second = graph.placeholder("x"), graph.placeholder("p_w")
    chain = [second]
    for i in range(length):
        joined = (chain[-1], first) if i == length // 2 else (chain[-1],)
        chain.append(graph.call_function(max, joined))
    return chain, first


def test_an_answer_is_that_of_a_walk() -> None:
    chain, first = _graph(10)
    asked: list[fx.Node] = []

    def source(node: fx.Node) -> bool | None:
        asked.append(node)
        return node is first if node.op == "placeholder" else None

    plain = [behind("x", node, source) for node in chain]
    assert plain == [False] * 6 + [True] * 5
    with searching():
        asked.clear()
        assert [behind("x", node, source) for node in reversed(chain)] == plain[::-1]
        # Each node is looked at when it is met and when its inputs are known.
        assert len(asked) <= 2 * (len(chain) + 1)
        asked.clear()
        assert behind("x", chain[-1], source)
        assert not asked
        assert not behind("y", chain[-1], lambda node: False), "another question"


def test_a_changed_graph_is_asked_again() -> None:
    chain, first = _graph(6)

    def source(node: fx.Node) -> bool | None:
        return node is first if node.op == "placeholder" else None

    with searching():
        assert behind("x", chain[-1], source)
    chain[4].args = (chain[3],)
    with searching():
        assert not behind("x", chain[-1], source)
    assert not behind("x", chain[-1], source)
