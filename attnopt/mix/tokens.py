"""The tensor of tokens that queries are projected from, where its rows are proven to be the queries."""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp
from torch import fx

from attnopt.errors import Decline
from attnopt.graph import value
from attnopt.patterns.dependence import Walk
from attnopt.patterns.index import Sizes
from attnopt.patterns.projections import Projection
from attnopt.patterns.views import shape
from attnopt.region import Region


@dataclass(frozen=True)
class Tokens:
    """A node `[batch, tokens, width]`, or `[batch * tokens, width]` if `folded`."""

    node: fx.Node
    folded: bool

    @property
    def width(self) -> int:
        """Features of a token."""
        return int(value(self.node).shape[-1])


def tokens(region: Region, query: Projection) -> Tokens | Decline:
    """What the query projection of a region reads: row (b, q) of it belongs to query q of batch entry b."""
    operand, size = region.query, shape(region.query.node)
    marks = {d: sp.Symbol(d, integer=True, nonnegative=True) for d in operand.dims if isinstance(d, str)}
    index = tuple(marks[d] if isinstance(d, str) else sp.Integer(d) for d in operand.dims)
    if region.batch not in (("b",), ()) or "q" not in marks:
        return Decline("its batch has several dimensions", operand.node)
    walk = Walk(Sizes({marks[d]: n for d, n in zip(operand.dims, size, strict=True) if isinstance(d, str)}), None)
    try:
        walk.visit(operand.node, index, ())
    except (NotImplementedError, TypeError) as error:
        return Decline(f"the tokens of its queries cannot be worked out: {error}", operand.node)
    at, rows = marks.get("b", sp.S.Zero), marks["q"]  # the only entry of a batch has no name
    apart, folded = (at, rows), (at * size[operand.dims.index("q")] + rows,)
    found = {tuple(sp.expand(i) for i in leaf.index[:-1]) for leaf in walk.leaves if leaf.node is query.node}
    if found == {apart}:
        return Tokens(query.input, False)
    if found == {tuple(sp.expand(i) for i in folded)}:
        return Tokens(query.input, True)
    return Decline("its queries are no rows of one tensor of tokens", operand.node)
