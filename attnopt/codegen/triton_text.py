"""Pieces of text that the Triton kernels of all kinds share, and what a text uses and assigns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def full(value: str) -> str:
    """One number for each row."""
    return f"tl.full([BLOCK_M, 1], {value}, tl.float32)"


def indent(lines: Iterable[str], width: int = 4) -> list[str]:
    """The lines moved to the right."""
    return [" " * width + line if line else line for line in lines]


_ASSIGNED = re.compile(r"^\s*([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*) (?:=|\+=) ")
_LOOP = re.compile(r"^\s*for (\w+) in ")


def words(lines: Iterable[str]) -> set[str]:
    """The identifiers that the lines use, attributes left out."""
    return set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", "\n".join(lines)))


def assigned(lines: Iterable[str]) -> list[str]:
    """The names that the lines give a value, in order."""
    found: dict[str, None] = {}
    for line in lines:
        if match := _ASSIGNED.match(line):
            found.update(dict.fromkeys(match[1].split(", ")))
        elif match := _LOOP.match(line):
            found[match[1]] = None
    return list(found)


def arguments(body: Sequence[str], available: Iterable[str], state: Sequence[str] = ()) -> list[str]:
    """What a function with this body has to be given of what is `available`, in that order, `state` first."""
    used, own = words(body), set(assigned(body))
    return [*state, *(name for name in dict.fromkeys(available) if name in used and name not in own)]


def head_map(table: tuple[int, ...], count: int, head: str = "h") -> str:
    """The key or value head of a query head: a formula where there is one, else nested choices by runs."""
    heads = len(table)
    for text, rule in (
        (head, lambda x: x),
        (f"{head} // {max(1, heads // count)}", lambda x: x // max(1, heads // count)),
        (f"{head} % {count}", lambda x: x % count),
    ):
        if table == tuple(map(rule, range(heads))):
            return text
    code = str(table[-1])
    for place in range(heads - 1, 0, -1):
        if table[place] != table[place - 1]:
            code = f"tl.where({head} < {place}, {table[place - 1]}, {code})"
    return code
