"""Normalisers: how the logits of a row become the weights of its values. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.readable import show


@dataclass(frozen=True)
class Softmax:
    """Exponentials that sum to one. `sink`: a logit per head (or query) that joins the denominator only."""

    sink: sp.Expr | None = None
    kind = "softmax"

    def __str__(self) -> str:
        return "" if self.sink is None else f"sink {show(self.sink)}"


@dataclass(frozen=True)
class Pointwise:
    """The score itself is the weight where `keep` holds, and zero elsewhere: sigmoid, ReLU, linear attention.

    `divide`: what a row's sum is divided by, an expression in the sum of its weights `t`, the sum of their
    absolute values `a`, the coordinates `b, h, q`, sizes and loads; 1 for nothing.
    """

    divide: sp.Expr = sp.S.One
    kind = "pointwise"

    def __str__(self) -> str:
        return "weight is the score" + ("" if self.divide == 1 else f", row divided by {show(self.divide)}")


@dataclass(frozen=True)
class Mixed:
    """Exponentials where `near` holds, products of features elsewhere, all divided by their common sum.

    Queries and keys have their features in the last `features` columns, `s` is the product of the columns before
    them: the weight is `exp(score)` or `sum of q*k over the features` (LoLCATs, Zhang et al., 2024).
    """

    near: Boolean
    features: int
    kind = "mixed"

    def __str__(self) -> str:
        return f"softmax where {show(self.near)}, elsewhere linear over {self.features} features, in one sum"


Normalizer = Softmax | Pointwise | Mixed


def normalizer_to_json(normalizer: Normalizer) -> dict[str, Any]:
    """As plain data for a spec's text."""
    if isinstance(normalizer, Pointwise):
        return {"kind": normalizer.kind, "divide": ex.to_tree(normalizer.divide)}
    if isinstance(normalizer, Mixed):
        near = ex.to_tree(ex.canon(normalizer.near))
        return {"kind": normalizer.kind, "near": near, "features": normalizer.features}
    return {"kind": normalizer.kind, "sink": None if normalizer.sink is None else ex.to_tree(normalizer.sink)}


def normalizer_from_json(data: dict[str, Any]) -> Normalizer:
    """The inverse of `normalizer_to_json`; raises `SpecError` for an unknown kind."""
    if data["kind"] == Pointwise.kind:
        return Pointwise(ex.from_tree(data["divide"]))
    if data["kind"] == Mixed.kind:
        return Mixed(ex.from_tree(data["near"]), int(data["features"]))
    if data["kind"] != Softmax.kind:
        raise SpecError(f"spec text names an unknown normalizer {data['kind']!r}.")
    return Softmax(None if data["sink"] is None else ex.from_tree(data["sink"]))
