"""`Pattern`: one way to recognise attention, built in or brought along by the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from attnopt.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import fx

    from attnopt.errors import Decline
    from attnopt.region import Region

    Match: TypeAlias = Callable[[fx.Node, Mapping[str, torch.Tensor]], Region | Decline | None]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name for the report, and the function that reads the attention around one node.

    Attributes:
        name: stands in the report; unique among the patterns of one `Options`.
        match: called as `match(node, constants)` for nodes of the captured graph in order. `constants` are the scalar
            tensors whose value nobody can change, by placeholder name. It gives None (not mine), a `Decline` (mine, but
            not proven: reason and node go into the report) or a `Region` (mine). It must not change the graph.

    Raises:
        OptionError: for a name that is no text, or a match that cannot be called.
    """

    name: str
    match: Match

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise OptionError(f"a pattern's name must be a non-empty text, not {self.name!r}.")
        if not callable(self.match):
            raise OptionError(f"pattern {self.name!r} needs a function match(node, constants), not {self.match!r}.")


def checked(patterns: Any) -> tuple[Pattern, ...]:
    """The patterns as a tuple. Raises `OptionError` for anything but patterns of different names."""
    if isinstance(patterns, (str, Pattern)) or not isinstance(patterns, Iterable):
        raise OptionError(
            f"option patterns must be a tuple of attnopt.Pattern, not {type(patterns).__name__}: "
            "write patterns=(*attnopt.PATTERNS, mine)."
        )
    found = tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, Pattern):
            hint = " Did you forget the star in *attnopt.PATTERNS?" if isinstance(pattern, (tuple, list)) else ""
            raise OptionError(f"option patterns holds {pattern!r}, which is no attnopt.Pattern.{hint}")
    names = [pattern.name for pattern in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(f"option patterns holds {', '.join(map(repr, twice))} more than once; rename one of them.")
    return found
