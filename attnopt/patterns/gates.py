"""What follows an attention: a factor of each head's output, which joins the spec as its `gate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
from torch import fx

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.functional import WRITES
from attnopt.graph import arguments, op_name, value
from attnopt.patterns.captures import capture, loaded
from attnopt.patterns.index import Sizes
from attnopt.patterns.lift import Lifter
from attnopt.patterns.safety import depends
from attnopt.patterns.site import Frame, _changed, _Extents, width
from attnopt.patterns.views import shape
from attnopt.region import Line, Operand, Region
from attnopt.spec import AttentionSpec, Pointwise

_PRODUCTS = {"aten::mul", "aten::div"}
Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Scaled:
    """An elementwise product of the attention and a factor: its node, the factor's value, its dimensions."""

    node: fx.Node
    factor: sp.Expr
    dims: Dims
    lifter: Lifter
    frame: Frame


def views_after(region: Region) -> tuple[fx.Node, Dims]:
    """The last of the views that alone use the region's output one after the other, and what its dimensions are."""
    node, dims = region.output, region.out_dims
    while len(node.users) == 1 and not node.meta.get(WRITES):
        (user,) = node.users
        moved = _moved(user, node, dims)
        if moved is None:
            break
        node, dims = user, moved
    return node, dims


def _moved(user: fx.Node, node: fx.Node, dims: Dims) -> Dims | None:
    """The dimensions of a view of `node` that moves or folds them; None if `user` is none or breaks them up."""
    seen = value(user)
    if user.meta.get(WRITES) or not isinstance(seen, torch.Tensor) or seen.dtype != value(node).dtype:
        return None
    marks = tuple(sp.Symbol(f"m{i}", integer=True, nonnegative=True) for i in range(len(shape(user))))
    found = Lifter(Sizes(dict(zip(marks, shape(user), strict=True)))).step(user, marks)
    if found is None or found[0] is not node or _numbers(user) != _numbers(node):
        return None
    names: dict[sp.Expr, dict[bool, tuple[str, ...]]] = {}
    for at, known, size in zip(found[1], dims, shape(node), strict=True):
        if at in marks:
            names[at] = {False: known}
        elif isinstance(at, (ex.FloorDiv, ex.Mod)) and at.args[0] in marks:
            names.setdefault(at.args[0], {})[isinstance(at, ex.Mod)] = known
        elif at != 0 or size != 1:
            return None
    if set(names) != set(marks):
        return None
    return tuple(tuple(x for _, part in sorted(names[m].items()) for x in part) for m in marks)


def _numbers(node: fx.Node) -> sp.Expr:
    return sp.expand(sp.Mul(*shape(node)))


def following(region: Region) -> Scaled | None:
    """The product that alone uses the region's output, perhaps through views that only move dimensions."""
    node, dims = views_after(region)
    if len(node.users) != 1 or node.meta.get(WRITES):
        return None
    (user,) = node.users
    seen = value(user)
    if not isinstance(seen, torch.Tensor) or seen.dtype != value(node).dtype or user.meta.get(WRITES) or user.kwargs:
        return None
    dims = _products_dims(user, node, dims)
    if dims is None or _numbers(user) != _numbers(node):
        return None
    framed, whole = frame_of(region, user, dims), frame_of(region, region.output, region.out_dims)
    lifter = Lifter(framed.sizes)
    lifter.stops.add(region.output)
    found = _lifted(lifter, user, framed.index)
    short = [sp.S.Zero if n == 1 else i for i, n in zip(whole.index, shape(region.output), strict=True)]
    hearts = [ex.load(region.output.name, *at) for at in (whole.index, short)]
    heart = next((x for x in hearts if found is not None and found.has(x)), None)
    if found is None or heart is None:
        return None
    factor = found / heart
    if factor.has(width) or any(x.args[0].name == region.output.name for x in factor.atoms(ex.Load)):
        return None
    return Scaled(user, factor, dims, lifter, framed)


def _products_dims(user: fx.Node, node: fx.Node, dims: Dims) -> Dims | None:
    """The dimensions of an elementwise product: those of its factor, an einsum's in the order of its letters."""
    if op_name(user) in _PRODUCTS:
        return dims if shape(user) == shape(node) else None
    found = letters(user)
    if found is None or node not in found[1]:
        return None
    names = dict(zip(found[0][found[1].index(node)], dims, strict=True))
    return tuple(names[c] for c in found[2]) if set(found[2]) == set(names) else None


def letters(node: fx.Node) -> tuple[list[str], list[fx.Node], str] | None:
    """Letters of the inputs, the inputs and letters of the result, of an einsum that sums nothing."""
    if op_name(node) != "aten::einsum":
        return None
    a = arguments(node)
    inputs, arrow, out = a["equation"].replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow or "." in inputs or set("".join(names)) != set(out) or any(len(set(x)) != len(x) for x in names):
        return None
    return names, list(a["tensors"]), out


def _lifted(lifter: Lifter, user: fx.Node, index: tuple[sp.Expr, ...]) -> sp.Expr | None:
    """The product's element."""
    found = letters(user)
    if found is None:
        return ex.as_number(lifter.lift(user, index))
    at = dict(zip(found[2], index, strict=True))
    parts = [
        lifter.lift(x, tuple(sp.S.Zero if n == 1 else at[c] for c, n in zip(names, shape(x), strict=True)))
        for names, x in zip(found[0], found[1], strict=True)
    ]
    return sp.Mul(*map(ex.as_number, parts))


def frame_of(region: Region, node: fx.Node, dims: Dims) -> Frame:
    """The frame that the region was read in, for a node whose dimensions are known."""
    heads, width_ = region.spec.heads.q, region.spec.heads.d_v
    batch = tuple(sp.Symbol(name, integer=True, nonnegative=True) for name in region.batch)
    symbols = {"q": ex.q, "d": width, "h": ex.h, **{b.name: b for b in batch}}
    known = {"h": sp.Integer(heads), "d": sp.Integer(width_)}
    index: list[sp.Expr] = []
    for names, size in zip(dims, shape(node), strict=True):
        at: sp.Expr = sp.S.Zero
        for name in names:
            extent = known.setdefault(name, sp.cancel(size / sp.Mul(*[known[n] for n in names if n != name])))
            at = at * extent + symbols[name]
        index.append(at)
    sizes = {symbols[name]: extent for name, extent in known.items()}
    key = shape(region.key.node)[region.key.dims.index("k")] if "k" in region.key.dims else sp.S.One
    fold = ex.b * heads + ex.h if any(names == ("b", "h") for names in dims) else None
    return Frame(tuple(index), dims, batch, Sizes({**sizes, ex.k: key}), heads, fold)


def absorb(region: Region, scaled: Scaled, part: str = "gate") -> Region | None:
    """The region with the product as its output and the factor in the gate (or the `divide`) of every term."""
    extents = _Extents(scaled.frame, region.output.graph)
    exprs: dict[str, Any] = {"gate": extents.rename(ex.canon(scaled.factor))}
    captures, exprs = loaded(exprs, scaled.lifter)
    if not isinstance(captures, dict) or any(isinstance(o.node, Line) for o in captures.values()):
        return None
    read = {*(o.node for o in captures.values()), *scaled.lifter.read}
    if any(depends(o.node, region.output) for o in captures.values()):
        return None
    terms = [_gated(term, exprs["gate"], captures, extents.scalars, scaled, part) for term in region.terms]
    operands = {o.node for t in region.terms for o in (t.query, t.key, t.value, *t.captures.values())}
    plain = {o.table if isinstance(o, Line) else o for o in operands}
    if any(t is None for t in terms) or _changed(read | plain, scaled.node) is not None:
        return None
    first, *others = terms
    return first.replace(merge=tuple(others), inner=region.inner | {scaled.node})  # type: ignore[union-attr]


def _gated(
    term: Region, gate: sp.Expr, captures: dict[str, Operand], scalars: dict[str, Any], scaled: Scaled, part: str
) -> Region | None:
    names = {name: _free(name, term.spec) for name in captures}
    numbers = {name: f"g{name}" for name in scalars}
    renamed = {ex.scalar(old): ex.scalar(new) for old, new in numbers.items()}
    loads = {
        x: ex.load(names[x.args[0].name], *x.args[1:], integer=isinstance(x, ex.IntLoad)) for x in gate.atoms(ex.Load)
    }
    gate = gate.xreplace(loads).xreplace(renamed)
    spec = replace(
        term.spec,
        gate=ex.canon(term.spec.gate * gate) if part == "gate" else term.spec.gate,
        normalizer=Pointwise(gate) if part == "divide" else term.spec.normalizer,
        captures=(*term.spec.captures, *(capture(names[n], o) for n, o in captures.items())),
        scalars=(*term.spec.scalars, *numbers.values()),
    ).canonical()
    try:
        spec = AttentionSpec.parse(spec.text)
    except SpecError:
        return None
    return term.replace(
        spec=spec, output=scaled.node, out_dims=scaled.dims,
        captures={**term.captures, **{names[n]: o for n, o in captures.items()}},
        scalars={**term.scalars, **{numbers[n]: x for n, x in scalars.items()}},
    )  # fmt: skip


def _free(name: str, spec: AttentionSpec) -> str:
    """A name for a gate's capture that the spec does not have."""
    base = f"gate_{name}" if name != "bias" else "gate"
    taken, count = {c.name for c in spec.captures}, 1
    while base + ("" if count == 1 else str(count)) in taken:
        count += 1
    return base + ("" if count == 1 else str(count))
