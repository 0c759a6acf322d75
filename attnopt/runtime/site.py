"""What a dispatcher knows of one spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnopt.analysis.chosen import lowered
from attnopt.codegen.cpp_loads import k_axes
from attnopt.returns import of_rows
from attnopt.runtime.reference import reference
from attnopt.runtime.sdpa import Sdpa, sdpa_scale
from attnopt.spec import AttentionSpec


class Reference:
    """The definition as a backend."""

    name = "reference"

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return reference(self.spec, q, k, v, captures, scalars)


class Site:
    """One spec: its backends by layout, and the shapes that have been checked.

    `calls` are sizes and strides that are known to run on which kernel, with what it reads of them. `lowered` is what
    runs in place of the spec where it has a selection, which is one more capture there.
    """

    def __init__(self, text: str) -> None:
        self.spec = AttentionSpec.parse(text)
        self.wants_lse = bool(of_rows(self.spec.returns))
        self.lowered = None if self.spec.select is None else lowered(self.spec)
        self.axes = k_axes(self.spec)
        self.backends: dict[Any, Any] = {}
        self.shapes: dict[Any, Any] = {}
        self.calls: dict[Any, Any] = {}
        self.classes: set[Any] = set()
        self.used: str | None = None
        self.reason = ""

    def forget(self) -> None:
        """Every shape is looked at anew."""
        self.shapes.clear()
        self.calls.clear()

    def fallback(self) -> Sdpa | Reference:
        """What runs where no kernel does."""
        return Reference(self.spec) if sdpa_scale(self.spec) is None else Sdpa(self.spec)
