"""`Region`: a spec tied to the nodes of the graph that it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnopt.spec import AttentionSpec

# A dimension of a tensor in a graph: a coordinate by name ("b", "b1", "h", "q", "k", "d"), a fixed index, or
# batch and heads folded into one dimension.
Dim = str | int | tuple[str, str]


@dataclass(frozen=True)
class Operand:
    """A node and what each of its dimensions is. Coordinates that do not occur are broadcast."""

    node: Any
    dims: tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Line:
    """A table gathered at places that depend on `k - q` alone: one value a head and distance, never one a pair.

    Stands where a node would: `table` is the tensor of rows, `places` the node of row numbers and the index at
    which it is read; `meta["val"]` has the shape `[heads, n_q + n_k - 1]`.
    """

    name: str
    table: Any
    places: Any
    index: tuple[Any, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """The node whose element `[b, h, q, k]` is the normalised weight, before dropout and factors; with the key of the
    spec (`analysis.plain`) and the operands that it is the weight of.
    """

    node: Any
    key: str
    query: Operand
    key_operand: Operand


@dataclass(frozen=True)
class Region:
    """One attention in a graph.

    Attributes:
        spec: what it computes.
        output: the node whose value the attention is; `out_dims` gives the coordinates folded in each dimension.
        query, key, value: operands in the layout of the source; `batch` names their batch coordinates in order.
        captures: capture name to operand; a dimension's name is the position it takes in the capture.
        scalars: scalar name to node or integer.
        inner: every node between the operands and the output.
        escapes: inner values that are also used elsewhere, such as returned weights; they stay in the graph.
        merge: further attentions with the same output, whose results are added to this one's.
        query_heads: head of the query operand for each query head, where that is another one.
        weights: the node of the weights, where it is known to hold them in the order of a fused attention.
        claims: other anchors that this region explains; what patterns say of those is dropped.
        pattern, source, module_path: which pattern found it, and where the user wrote it.
    """

    spec: AttentionSpec
    output: Any
    out_dims: tuple[tuple[str, ...], ...]
    batch: tuple[str, ...]
    query: Operand
    key: Operand
    value: Operand
    captures: Mapping[str, Operand]
    scalars: Mapping[str, Any]
    anchor: Any
    pattern: str
    source: str | None
    module_path: str
    inner: frozenset[Any] = frozenset()
    escapes: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    merge: tuple[Region, ...] = ()
    query_heads: tuple[int, ...] = ()
    claims: frozenset[Any] = frozenset()
    weights: Weights | None = None

    @property
    def terms(self) -> tuple[Region, ...]:
        """The attentions that are added up: this one without `merge`, then those of `merge`."""
        return (replace(self, merge=()), *self.merge) if self.merge else (self,)

    @property
    def whole(self) -> AttentionSpec:
        """The spec of the sum; `spec` is that of the first term."""
        return replace(self.spec, merge=tuple(r.spec for r in self.merge)) if self.merge else self.spec

    def replace(self, **changes: Any) -> Region:
        """The region with other fields."""
        return replace(self, **changes)
