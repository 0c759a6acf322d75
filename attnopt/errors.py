"""The exception family, and `Decline`: the value that says why something was left alone."""

from __future__ import annotations

from dataclasses import dataclass


class AttnoptError(Exception):
    """Base of every error that attnopt raises on purpose."""


class OptionError(AttnoptError, ValueError):
    """An option, rewrite or argument that does not exist or does not fit."""


class CaptureError(AttnoptError):
    """The model could not be turned into a graph."""


class ShapeError(AttnoptError, ValueError):
    """Inputs outside the shapes, dtypes or devices that were captured."""


class SpecError(AttnoptError, ValueError):
    """A spec that is not well formed, or text that does not describe one."""


class CompileError(AttnoptError):
    """Generated source that could not be compiled or loaded."""


class CacheError(AttnoptError):
    """A cache folder or entry that cannot be used safely."""


class ValidationError(AttnoptError):
    """A kernel or a rewrite whose result is outside its contract."""


class RewriteError(AttnoptError):
    """A rewrite that broke its own contract."""


class UnfusedError(AttnoptError):
    """`strict=True` and at least one site was declined."""


@dataclass(frozen=True, slots=True)
class Decline:
    """A near miss: returned, never raised, and shown in the report.

    `node` is the graph node at which the reasoning stopped; it is opaque here. `hint` is the smallest change that
    lifts the reason, where the place that declines knows better than the table of hints.
    """

    reason: str
    node: object = None
    hint: str = ""

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.reason} (at %{self.node})"
