"""Lifting: the value of a node at an index, as an expression of the coordinates and of loads.

Pull-based: `lift(node, index)` asks what one element is. Views substitute the index, pointwise operators
build expressions, `arange` and friends are coordinates, everything else is a load from the node's tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.functional import WRITES
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.contraction import CONTRACTIONS, factors, is_contraction
from attnopt.patterns.finite import is_finite
from attnopt.patterns.gathers import GATHERS, REGULAR, plain_gradient, trailing
from attnopt.patterns.index import Sizes
from attnopt.patterns.known import KNOWN, Known
from attnopt.patterns.masks import absorbed
from attnopt.patterns.ops import COSTLY, POINTWISE
from attnopt.patterns.rounding import cancels, loads_floats, out_of_range, overflows, rounds, undefined
from attnopt.patterns.safety import cuts_gradient
from attnopt.patterns.views import CASTS, VIEWS, Index, broadcast, pieces, shape, size
from attnopt.region import Line

_CONSTANTS = {
    "aten::zeros": 0, "aten::new_zeros": 0, "aten::zeros_like": 0, "aten::ones": 1, "aten::new_ones": 1,
    "aten::ones_like": 1, "aten::full": None, "aten::new_full": None, "aten::full_like": None,
    "aten::scalar_tensor": None,
}  # fmt: skip
_LARGE = 48
_MOST_TERMS = 1500
_NARROW = (torch.uint8, torch.int8, torch.int16)
_HALF = (torch.float16, torch.bfloat16)
_SUMS = ("aten::add", "aten::sub")
_ARITHMETIC = (*_SUMS, "aten::mul", "aten::div")
_ORDERED = ("aten::lt", "aten::le", "aten::gt", "aten::ge")
_COMPARISONS = ("aten::eq", "aten::ne", *_ORDERED)
# Ends the name of a load that stands for the product alone, inside a `baddbmm` or an `einsum` of three operands.
PRODUCT = "_product"


class TooLarge(Exception):  # noqa: N818  (a limit, no error)
    """What stands before the site is too long a computation to be read as mathematics, such as an unrolled loop."""


class Lifter:
    """Lifts nodes over one set of coordinates. Results are remembered by node and index."""

    def __init__(self, sizes: Sizes, constants: Mapping[str, torch.Tensor] | None = None, deep: bool = False) -> None:
        self.sizes = sizes
        self.deep = deep
        self.constants = constants if isinstance(constants, Known) else Known(constants or {})
        self.stops: set[fx.Node] = set()
        self.nodes: dict[str, Any] = {}
        self.dropout: dict[fx.Node, float] = {}
        # The largest finite score: what is added beyond it is infinite.
        self.limit = float("inf")
        self._known: dict[tuple[fx.Node, Index], sp.Basic] = {}
        self._weights: dict[sp.Basic, int] = {}

    @property
    def read(self) -> set[fx.Node]:
        """Every node whose value was asked for."""
        return {node for node, _ in self._known}

    def lift(self, node: Any, index: Index) -> sp.Basic:
        """The element of `node` at `index`. Booleans give sympy booleans."""
        if not isinstance(node, fx.Node):
            return _constant(node)
        index = tuple(index)
        if (node, index) not in self._known:
            if len(self._known) > self.constants.budget:
                raise TooLarge(f"more than {self.constants.budget} elements of the graph would have to be read")
            self._known[node, index] = self._bounded(self._lift(node, index))
        return self._known[node, index]

    def _bounded(self, found: sp.Basic) -> sp.Basic:
        """The expression, if it is small enough to be worked with."""
        if _weight(found, self._weights) > _MOST_TERMS:
            raise TooLarge(f"an element of the graph is an expression of more than {_MOST_TERMS} terms")
        return found

    def step(self, node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
        """One view substitution toward the input, or None if the node is no view."""
        name = op_name(node)
        if cuts_gradient(node):
            return None
        if name in VIEWS and name not in ("aten::lift_fresh",):
            a = arguments(node)
            try:
                inner, old = VIEWS[name](a, index, shape(node), self.sizes)
            except NotImplementedError:
                return None
            return inner, tuple(sp.expand(i) if isinstance(i, (sp.Add, sp.Mul)) else i for i in old)
        if name in CASTS and value(node).dtype == value(node.args[0]).dtype:
            return node.args[0], index
        if node.op == "call_function" and node.target is operator.getitem:
            found = pieces(node)
            if found is None:
                return broadcast(node, index)
            whole, dim, offset = found
            if len(index) < len(shape(whole)):
                return whole, (*index[:dim], offset, *index[dim:])
            return whole, tuple(i + offset if place == dim else i for place, i in enumerate(index))
        return None

    def _lift(self, node: fx.Node, index: Index) -> sp.Basic:
        seen = value(node)
        if not isinstance(seen, torch.Tensor):
            return size(node) if isinstance(seen, (int, torch.SymInt, torch.SymFloat)) else self._load(node, ())
        if node in self.stops:
            return self._load(node, index)
        moved = self.step(node, index)
        if moved is not None:
            return self._settled(node, index, self.lift(*moved))
        if _outlived(node):
            return self._load(node, index)
        try:
            found = self._compute(node, op_name(node), index)
        except NotImplementedError:
            found = None
        if found is not None:  # what a pointwise function of booleans gives is a boolean by its dtype, not by its form
            found = ex.truth(found) if seen.dtype == torch.bool else ex.as_number(found)
        if found is not None and (overflows(found, seen.dtype) or undefined(found)):
            found = None
        if found is not None and out_of_range(found) and not self._contains_contraction(found):
            found = None
        if found is not None and (self.deep or self._contains_contraction(found) or not _costly(found)):
            return found
        line = None if self.deep or found is None else self._line(node, index)
        return self._load(node, index) if line is None else line

    def _line(self, node: fx.Node, index: Index) -> sp.Basic | None:
        """A gathered table whose places depend on `k - q` alone, as a load from one line a head."""
        if op_name(node) != "aten::embedding" or index[-1] != ex.h or not isinstance(value(node), torch.Tensor):
            return None
        a = arguments(node)
        if not plain_gradient(a):
            return None
        deep = Lifter(self.sizes, self.constants, deep=True)
        gap = sp.Symbol("gap", integer=True)
        places = deep.lift(a["indices"], index[:-1])
        moved = ex.canon(places.xreplace({ex.k: ex.q + gap}))
        if deep.nodes or not moved.has(gap) or moved.has(ex.q):
            return None
        extent = self.sizes.sizes[ex.q] + self.sizes.sizes[ex.k] - 1
        length = int(extent) if extent.is_Integer else 1 << 20
        fake = torch.empty(int(self.sizes.sizes[ex.h]), length, device="meta", dtype=value(node).dtype)
        name = f"{node.name}_line"
        self.nodes[name] = Line(
            name, a["weight"], a["indices"], index[:-1], {"val": fake, "symbolic": not extent.is_Integer}
        )
        return ex.load(name, ex.h, ex.k - ex.q + self.sizes.sizes[ex.q] - 1)

    def _settled(self, node: fx.Node, index: Index, found: sp.Basic) -> sp.Basic:
        """A load at computed places becomes a load from this view, if the places are plain coordinates here."""
        plain = all(i.is_Symbol or i.is_Integer for i in index)
        if plain and _skewed(found):
            return self._load(node, index)
        inner = found.args[0] if isinstance(found, sp.Ne) else found
        if not isinstance(inner, ex.Load) or self._contains_contraction(inner):
            return found
        if isinstance(self.nodes[inner.args[0].name], Line):
            return found
        computed = any(i.has(sp.Mul, ex.FloorDiv, ex.Mod, ex.Load) for i in inner.args[1:])
        return self._load(node, index) if plain and computed else found

    def _compute(self, node: fx.Node, name: str, index: Index) -> sp.Basic | None:
        a = arguments(node) if name else {}
        if name in CASTS:
            return self._cast(node, index)
        if name in _CONSTANTS:
            fill = _CONSTANTS[name] if _CONSTANTS[name] is not None else a.get("fill_value", a.get("s"))
            found = self.lift(fill, ())
            return ex.truth(found) if value(node).dtype == torch.bool else found
        if name == "aten::arange":
            return self.lift(a.get("start", 0), ()) + self.lift(a.get("step", 1), ()) * index[0]
        if name in ("aten::dropout", "aten::native_dropout"):
            if a["train"] and a["p"] > 0:
                self.dropout[node] = float(a["p"])
            return self.lift(a["input"], index)
        if name in POINTWISE:
            return self._pointwise(node, name, index)
        if name in ("aten::baddbmm", "aten::addmm"):
            added = ex.as_number(self._broadcast(a["self"], index)) * ex.number(a["beta"])
            return added + self._product(node, index) * ex.number(a["alpha"])
        if name == "aten::einsum" and len(a["tensors"]) > 2 and is_contraction(node):
            others = [ex.as_number(self.lift(*side)) for side in factors(node, index)]
            return sp.Mul(self._product(node, index), *others) if len(a["tensors"]) == len(others) + 2 else None
        rule = GATHERS.get(name, REGULAR.get(name))
        if rule is not None:
            return rule(self, node, a, index)
        if node.op in ("placeholder", "get_attr") and str(node.target) in self.constants and not index:
            node.meta[KNOWN] = True
            return _constant(self.constants[str(node.target)].item())
        return None

    def _product(self, node: fx.Node, index: Index) -> sp.Expr:
        self.nodes[f"{node.name}{PRODUCT}"] = node
        return ex.load(f"{node.name}{PRODUCT}", *index)

    def _pointwise(self, node: fx.Node, name: str, index: Index) -> sp.Basic:
        dtype, given = value(node).dtype, [self._broadcast(x, index) for x in node.args]
        products = dtype == torch.int32 and name == "aten::mul" and all(e.has(ex.IntLoad) for e in given)
        if products or dtype in _NARROW:
            raise NotImplementedError("arithmetic of narrow integers, which wraps around")
        if name in _COMPARISONS and any(_rounds(x, e) for x, e in zip(node.args, given, strict=True)):
            raise NotImplementedError("a comparison of positions that are rounded")
        if name in _ORDERED and any(map(loads_floats, given)) and not any(map(self._contains_contraction, given)):
            raise NotImplementedError("an order of floats, whose opposite does not hold for NaN either")
        named = {k: self._broadcast(x, index) for k, x in node.kwargs.items() if k not in ("dtype", "out")}
        if "rounding_mode" in node.kwargs:
            named["rounding_mode"] = node.kwargs["rounding_mode"]
        found = POINTWISE[name](*given, **named)
        if name in _ARITHMETIC and cancels(found, (*given, *named.values())):
            raise NotImplementedError("a float that cancels, which infinities do not: inf - inf is NaN")
        if name in _SUMS and value(node).dtype in _HALF and self._contains_contraction(found):
            return absorbed(found, torch.finfo(value(node).dtype).eps)
        return found

    def _broadcast(self, x: Any, index: Index) -> Any:
        if not isinstance(x, fx.Node) or not isinstance(value(x), torch.Tensor):
            return None if x is None else self.lift(x, ())
        return self.lift(x, trailing(x, index))

    def _cast(self, node: fx.Node, index: Index) -> sp.Basic:
        inner = self.lift(node.args[0], index)
        old, new = value(node.args[0]).dtype, value(node).dtype
        if new == torch.bool:
            return ex.truth(inner)
        if new in _NARROW and old not in (torch.bool, new):
            raise NotImplementedError("a cast to narrow integers, which wraps around")
        if new.is_floating_point or not old.is_floating_point:
            return ex.as_number(inner)
        return ex.Trunc(ex.as_number(inner))

    def _load(self, node: fx.Node, index: Index) -> sp.Basic:
        closed = None if node in self.stops else self.constants.closed(node, index)
        if closed is not None:
            return closed
        self.nodes[node.name] = node
        dtype = value(node).dtype if isinstance(value(node), torch.Tensor) else torch.float32
        found = ex.load(node.name, *index, integer=not dtype.is_floating_point)
        return sp.Ne(found, 0) if dtype == torch.bool else found

    def finite(self, name: str) -> bool:
        """Whether a loaded tensor is no mask: parameters, products, and what is picked or computed from them."""
        node = self.nodes.get(name)
        return isinstance(node, Line) or is_finite(node, self.constants)

    def _contains_contraction(self, found: sp.Basic) -> bool:
        nodes = (self.nodes.get(load.args[0].name) for load in found.atoms(ex.Load))
        return any(n in self.stops or op_name(n) in CONTRACTIONS or is_contraction(n) for n in nodes if n is not None)


def _outlived(node: fx.Node) -> bool:
    """Whether a position or mask was made of what is changed in place later on: only the node has the value of then."""
    writes = (write for source in node.all_input_nodes for write in source.meta.get(WRITES, ()))
    return not value(node).is_floating_point() and any(node < write for write in writes)


def _skewed(found: sp.Basic) -> bool:
    """Whether a load is read along a diagonal that was made by a view of another width, as in a relative shift."""
    places = (i for load in found.atoms(ex.Load) for i in load.args[1:])
    return any(i.has(ex.FloorDiv, ex.Mod) and {ex.q, ex.k} <= i.free_symbols for i in places)


def _weight(expr: sp.Basic, known: dict[sp.Basic, int]) -> int:
    """The number of nodes of the expression as a tree; shared parts are counted once and remembered."""
    if expr not in known:
        known[expr] = 1 + sum(_weight(a, known) for a in expr.args)
    return known[expr]


def _rounds(x: Any, found: sp.Basic) -> bool:
    return isinstance(x, fx.Node) and isinstance(value(x), torch.Tensor) and rounds(found, value(x).dtype)


def _constant(x: Any) -> sp.Basic:
    if isinstance(x, bool):
        return sp.true if x else sp.false
    if isinstance(x, (int, float)):
        return ex.number(x)
    if isinstance(x, torch.SymInt):
        return size(x)
    raise NotImplementedError(f"a constant of type {type(x).__name__}")


def _costly(found: sp.Basic) -> bool:
    """Whether loading the value beats computing it: transcendental functions, loads at loaded places, long chains."""
    if found.has(*COSTLY):
        return True
    return any(i.has(ex.Load) for load in found.atoms(ex.Load) for i in load.args[1:]) or found.count_ops() > _LARGE
