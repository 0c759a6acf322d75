"""What is known of nodes while a graph is searched. Kept for one search, during which nothing changes the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import fx

Answers = dict[fx.Node, bool]
_lists: ContextVar[dict[str, list[Any]] | None] = ContextVar("attnopt_lists", default=None)
_active: ContextVar[dict[str, Answers] | None] = ContextVar("attnopt_memo", default=None)


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """Remember answers inside, and forget them at the end: the next search may see a changed graph."""
    token, lists = _active.set({}), _lists.set({})
    try:
        yield
    finally:
        _active.reset(token)
        _lists.reset(lists)


def kept(name: str) -> list[Any]:
    """A list that one search fills; a new one outside of any."""
    lists = _lists.get()
    return [] if lists is None else lists.setdefault(name, [])


def behind(name: str, node: fx.Node, source: Callable[[fx.Node], bool | None]) -> bool:
    """Whether something that is a source stands behind the node, itself included.

    `source` says of a node whether it is one, or None to ask its inputs. Under `searching` every node is asked once,
    whatever the number of questions; `name` tells one kind of question from another.
    """
    tables = _active.get()
    known = {} if tables is None else tables.setdefault(name, {})
    stack = [node]
    while stack:
        current = stack[-1]
        if current not in known:
            own = source(current)
            if own is None:
                inputs = current.all_input_nodes
                waiting = [n for n in inputs if n not in known]
                if waiting and not any(known.get(n) for n in inputs):
                    stack += waiting
                    continue
                own = any(known.get(n) for n in inputs)
            known[current] = own
        stack.pop()
    return known[node]
