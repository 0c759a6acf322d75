"""From a root contraction and a logit to a `Region`: coordinates, operands, captures, spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy as sp
from torch import fx

from attnopt import expr as ex
from attnopt.errors import Decline, SpecError
from attnopt.functional import WRITES
from attnopt.graph import module_path, op_name, source_line
from attnopt.patterns.captures import capture, loaded
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.masks import Masked
from attnopt.patterns.operands import Place, own_heads, resolve
from attnopt.patterns.safety import jumps, unsafe
from attnopt.patterns.sizes import fix
from attnopt.patterns.views import Index, shape
from attnopt.region import Line, Region
from attnopt.spec import AttentionSpec, Heads, Normalizer, Pointwise, Softmax

width = sp.Symbol("width", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Frame:
    """The coordinates of a site: the output's index, its dimensions by name, and every extent.

    `alike` are further names of the number of keys: sizes that the applying operator requires to equal it.
    """

    index: Index
    dims: tuple[tuple[str, ...], ...]
    batch: tuple[sp.Symbol, ...]
    sizes: Sizes
    heads: int
    fold: sp.Expr | None = None
    alike: frozenset[sp.Expr] = frozenset()

    def extent(self, symbol: sp.Symbol) -> sp.Expr:
        """How many values a coordinate takes."""
        return self.sizes.sizes[symbol]

    def fits(self, symbol: sp.Symbol, size: sp.Expr) -> bool:
        """Whether a dimension of this size holds every value of the coordinate and no more."""
        return size == self.extent(symbol) or (symbol == ex.k and size in self.alike)

    def single(self, symbol: sp.Symbol) -> bool:
        """Whether the coordinate takes one value only, so that indices need not mention it."""
        return bool(self.extent(symbol) == 1)


def frame(
    output: fx.Node, query_dim: int | None, width_dim: int, n_k: sp.Expr, d_qk: sp.Expr, fold: int | None
) -> Frame | Decline:
    """Name the output's dimensions. `query_dim` None: one query, without a dimension. `fold`: heads in the batch."""
    extents = shape(output)
    others = [i for i in range(len(extents)) if i not in (query_dim, width_dim)]
    sizes = {
        ex.q: sp.S.One if query_dim is None else extents[query_dim],
        width: extents[width_dim],
        ex.k: n_k,
        ex.d: d_qk,
    }
    index: list[Any] = [None] * len(extents)
    dims: list[tuple[str, ...]] = [()] * len(extents)
    if query_dim is not None:
        index[query_dim], dims[query_dim] = ex.q, ("q",)
    index[width_dim], dims[width_dim] = width, ("d",)
    batch: list[sp.Symbol] = []
    heads: sp.Expr = sp.S.One
    if fold is not None and len(others) == 1:
        (place,) = others
        index[place], dims[place], heads = ex.b * fold + ex.h, ("b", "h"), sp.Integer(fold)
        batch, sizes[ex.b] = [ex.b], sp.cancel(extents[place] / fold)
    else:
        *outer, last = others if len(others) > 1 else [*others, None]
        if last is not None:
            index[last], dims[last], heads = ex.h, ("h",), extents[last]
        for i, place in enumerate(outer):
            name = "b" if len(outer) == 1 else f"b{i}"
            symbol = sp.Symbol(name, integer=True, nonnegative=True)
            index[place], dims[place], sizes[symbol] = symbol, (name,), extents[place]
            batch.append(symbol)
    if not heads.is_Integer:
        fix(output, heads)
        return Decline("the number of heads is not known when the graph is captured", output)
    if not extents[width_dim].is_Integer:
        fix(output, extents[width_dim])
        return Decline("the width of the values is not known when the graph is captured", output)
    sizes[ex.h] = heads
    folded = ex.b * fold + ex.h if ("b", "h") in dims else None
    return Frame(tuple(index), tuple(dims), tuple(batch), Sizes(sizes), int(heads), folded)


@dataclass(frozen=True)
class Parts:
    """What a pattern found: anchors, the masked logit over `s`, and the three operands with their indices.

    `product` is the contraction that `s` stands for, where the graph has it.
    """

    pattern: str
    anchor: fx.Node
    output: fx.Node
    masked: Masked
    query: Place
    key: Place
    value: Place
    gate: sp.Expr = sp.S.One
    dropout: float = 0.0
    product: fx.Node | None = None
    normalizer: Normalizer = field(default_factory=Softmax)
    weight: sp.Expr = sp.S.One


def build(parts: Parts, frame: Frame, lifter: Lifter) -> Region | Decline:
    """Assemble the region. Declines where an operand's index is no view of a tensor by heads."""
    operands, maps = {}, {}
    for role, place in (("query", parts.query), ("key", parts.key), ("value", parts.value)):
        found = resolve(place, frame, lifter, role)
        if isinstance(found, Decline):
            return found
        operands[role], maps[role] = found.operand, found
    scale = sp.Mul(*[m.factor for role, m in maps.items() if role != "value"])
    scaled = {ex.s: scale * ex.s} if scale != 1 else {}
    extents = _Extents(frame, parts.output.graph)
    exprs = {
        "score": parts.masked.score.xreplace(scaled), "keep": parts.masked.keep,
        "gate": parts.gate * maps["value"].factor, "weight": parts.weight.xreplace(scaled),
    }  # fmt: skip
    exprs |= {n: e for n in ("divide", "sink") if (e := getattr(parts.normalizer, n, None)) is not None}
    # That a weight takes the sign of its score is what a signed softmax is; only a score of zero is undecided.
    signed = {"weight": exprs["weight"].replace(sp.sign, lambda x: sp.S.One)}
    if any(jumps(e) for e in {**exprs, **signed}.values()) or parts.masked.keep.has(ex.s):
        return Decline("scores are compared with one another; rounding could decide differently", parts.anchor)
    exprs = {name: extents.rename(ex.canon(e)) for name, e in exprs.items()}
    captures, exprs = loaded(exprs, lifter)
    if isinstance(captures, Decline):
        return captures
    heads = Heads(
        frame.heads, maps["key"].heads, maps["value"].heads, int(frame.extent(ex.d)), int(frame.extent(width)),
        maps["key"].table, maps["value"].table,
    )  # fmt: skip
    spec = AttentionSpec(
        heads=heads, score=exprs["score"], keep=exprs["keep"], gate=exprs["gate"],
        normalizer=_normalizer(parts.normalizer, exprs), weight=exprs["weight"], empty_row=parts.masked.empty_row,
        dropout=parts.dropout, scalars=tuple(extents.scalars),
        captures=tuple(capture(name, operand) for name, operand in captures.items()),
    ).canonical()  # fmt: skip
    try:
        spec.verify()
        spec = AttentionSpec.parse(spec.text)
    except SpecError as error:
        return Decline(f"the attention was read but cannot be expressed: {error}", parts.anchor)
    changed = _changed({*lifter.read, *(o.node for o in operands.values())}, parts.output)
    if changed is not None:
        return Decline("a tensor that the attention reads is changed in place before the attention ends", changed)
    places = {role: operand.node for role, operand in operands.items()}
    read = (o.node.table if isinstance(o.node, Line) else o.node for o in captures.values())
    harm = unsafe(places, read, parts.product or parts.anchor, parts.output)
    region = harm or _region(parts, frame, spec, operands, captures, extents.scalars)
    if isinstance(region, Region) and not own_heads(maps["query"], frame.heads):
        return region.replace(query_heads=maps["query"].table)
    return region


def _normalizer(normalizer: Normalizer, exprs: Mapping[str, Any]) -> Normalizer:
    """The normaliser with its own expression in the spec's symbols."""
    return Pointwise(exprs["divide"]) if isinstance(normalizer, Pointwise) else Softmax(exprs.get("sink"))


def _changed(read: set[fx.Node], output: fx.Node) -> fx.Node | None:
    """A write that stands between what the site reads and the output, where everything will be read."""
    writes = ((node, write) for node in read for write in node.meta.get(WRITES, ()))
    return next((write for node, write in writes if node < write < output), None)


def _region(parts: Parts, frame: Frame, spec: AttentionSpec, operands: Any, captures: Any, scalars: Any) -> Region:
    from attnopt.analysis.dataflow import Dataflow  # networkx takes long to import

    leaves = {o.node.table if isinstance(o.node, Line) else o.node for o in (*operands.values(), *captures.values())}
    sources = {operands["query"].node, operands["key"].node}
    ways = (lambda n: _tensors(n.all_input_nodes), lambda n: _tensors(n.users))
    flow = Dataflow.around(sources, parts.output, *ways, leaves)
    inner = flow.between(sources, parts.output) - leaves
    inner.add(parts.output)
    escapes = tuple(str(n) for n in flow.escapes(inner, parts.output))
    return Region(
        spec=spec, output=parts.output, out_dims=frame.dims, batch=tuple(s.name for s in frame.batch),
        query=operands["query"], key=operands["key"], value=operands["value"], captures=captures, scalars=scalars,
        anchor=parts.anchor, pattern=parts.pattern, source=source_line(parts.anchor),
        module_path=module_path(parts.anchor), inner=frozenset(inner), escapes=escapes,
    )  # fmt: skip


def _tensors(nodes: Iterable[fx.Node]) -> Iterable[fx.Node]:
    """The nodes without those that are sizes: reading a size computes nothing from the elements."""
    return (n for n in nodes if op_name(n) != "aten::sym_size")


class _Extents:
    """Symbolic sizes of the graph by their names in a spec: `n_q`, `n_k`, or a scalar read at run time."""

    def __init__(self, frame: Frame, graph: fx.Graph) -> None:
        self.names: dict[sp.Symbol, sp.Symbol] = {}
        self.scalars: dict[str, Any] = {}
        self.graph = graph
        known = {ex.n_q: frame.extent(ex.q), ex.n_k: frame.extent(ex.k)}
        for name, extent in known.items():
            if isinstance(extent, sp.Symbol):
                self.names.setdefault(extent, name)
        self.flat = dict(zip(frame.batch, _unflatten(frame), strict=True)) if len(frame.batch) > 1 else {}
        self.coordinates = {*ex.COORDINATES, ex.s, ex.t, ex.a, *ex.SIZES}

    def rename(self, expr: sp.Basic) -> sp.Basic:
        """The expression in the spec's own symbols."""
        expr = expr.xreplace(self.flat)
        capture_names = {load.args[0] for load in expr.atoms(ex.Load)}
        for symbol in sorted(expr.free_symbols - self.coordinates - capture_names, key=str):
            if symbol not in self.names:
                name = f"n{len(self.scalars)}"
                self.names[symbol], self.scalars[name] = ex.scalar(name), symbol
        return expr.xreplace(self.names)


def _unflatten(frame: Frame) -> list[sp.Expr]:
    """Each batch coordinate as a part of the single coordinate `b`."""
    out: list[sp.Expr] = []
    inner: sp.Expr = sp.S.One
    for place, symbol in reversed(list(enumerate(frame.batch))):
        x = ex.FloorDiv(ex.b, inner)
        out.append(x if place == 0 else ex.Mod(x, frame.extent(symbol)))
        inner = inner * frame.extent(symbol)
    return out[::-1]
