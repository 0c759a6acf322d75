"""Rewrites and their contracts, and the driver that runs them in order and checks what they promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from attnopt.errors import AttnoptError, Decline, OptionError, RewriteError
from attnopt.region import Region


@dataclass(frozen=True)
class Exact:
    """The result is the same mathematics; runs by default."""


@dataclass(frozen=True)
class Approx:
    """The result differs within a tolerance that is measured on calibration inputs; runs only by name."""


EXACT = Exact()
APPROX = Approx()


class Rewrite(Protocol):
    """One change of a region: `apply` gives the new region, or a `Decline` that leaves it as it was."""

    name: str
    contract: Exact | Approx
    requires: frozenset[str]
    provides: frozenset[str]

    def apply(self, region: Region) -> Region | Decline:
        """The rewritten region; the same object if there was nothing to do."""
        ...


@dataclass(frozen=True)
class Rule:
    """A rewrite that is one function of the region; with `output`, a sum of attentions is given to it as a whole."""

    name: str
    apply: Callable[[Region], Region | Decline]
    contract: Exact | Approx = EXACT
    requires: frozenset[str] = field(default_factory=frozenset)
    provides: frozenset[str] = field(default_factory=frozenset)
    output: bool = False


def check_flag(rewrite: str, name: str, given: object) -> None:
    """Raise `OptionError` unless an option is True or False."""
    if not isinstance(given, bool):
        raise OptionError(f"{rewrite}({name}={given!r}) must be True or False.")


def check_order(rewrites: Sequence[Rewrite]) -> None:
    """Raise unless everything a rewrite requires is provided by one before it."""
    provided: set[str] = set()
    for rewrite in rewrites:
        missing = rewrite.requires - provided
        if missing:
            raise RewriteError(
                f"rewrite {rewrite.name} requires {', '.join(sorted(missing))}, which no earlier one provides."
            )
        provided |= rewrite.provides


def _apply(rewrite: Rewrite, region: Region) -> Region | Decline:
    """The rewrite of every attention of a sum, or of the sum as a whole where the rewrite reads the output."""
    if not region.merge or getattr(rewrite, "output", False):
        return rewrite.apply(region)
    terms, new = region.terms, []
    for term in terms:
        found = rewrite.apply(term)
        if isinstance(found, Decline):
            return found
        new.append(found)
    if all(x is y for x, y in zip(terms, new, strict=True)):
        return region
    return new[0].replace(merge=tuple(new[1:]))


def run(region: Region, rewrites: Sequence[Rewrite]) -> tuple[Region, list[Decline]]:
    """Apply the rewrites in order; every changed spec is verified, and a failure names the rewrite."""
    declines: list[Decline] = []
    for rewrite in rewrites:
        result = _apply(rewrite, region)
        if isinstance(result, Decline):
            declines.append(Decline(f"{rewrite.name}: {result.reason}", result.node))
            continue
        if result is not region:
            try:
                result.whole.verify()
            except AttnoptError as error:
                raise RewriteError(f"rewrite {rewrite.name} made an invalid spec: {error}") from error
            result = result.replace(rewrites=(*region.rewrites, rewrite.name))
        region = result
    return region, declines
