"""The spec's own parts of a C++ kernel: what fills the holes of the skeleton."""

from __future__ import annotations

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen.base import Layout, Plan
from attnopt.codegen.cpp_dialect import CPP
from attnopt.codegen.cpp_gather import ROW_SCRATCH, VISIT_TILES, row_holes
from attnopt.codegen.cpp_lists import visit_holes
from attnopt.codegen.cpp_loads import C_TYPES, CppLoader
from attnopt.codegen.cpp_normalizer import indent, normalizer_holes
from attnopt.codegen.cpp_whole import NEXT
from attnopt.codegen.printer import Printer, Value
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec

_SCALARS = {x: Value(x.name, "i") for x in (ex.b, ex.h, ex.q, *ex.SIZES, tiles.q0, tiles.q1)}


def scaled(score: sp.Expr) -> tuple[sp.Expr, sp.Expr]:
    """A number c and the score in terms of c*s, where every s stands in a product with the same number c."""
    found: set[sp.Expr] = set()
    stack: list[sp.Basic] = [score]
    while stack:
        node = stack.pop()
        if node == ex.s:
            found.add(sp.S.One)
        elif isinstance(node, sp.Mul) and ex.s in node.args and node.args[0].is_number:
            found.add(node.args[0])
            stack.extend(a for a in node.args[1:] if a != ex.s)
        else:
            stack.extend(node.args)
    if len(found) != 1 or not next(iter(found)).is_finite or found == {sp.S.Zero}:
        return sp.S.One, score
    scale = found.pop()
    return scale, score.xreplace({scale * ex.s: ex.s}) if score == scale * ex.s else _unscaled(score, scale)


def _unscaled(expr: sp.Basic, scale: sp.Expr) -> sp.Basic:
    if isinstance(expr, sp.Mul) and ex.s in expr.args and scale in expr.args:
        return expr.func(*[_unscaled(a, scale) for a in expr.args if a != scale])
    return expr.func(*[_unscaled(a, scale) for a in expr.args]) if expr.args else expr


def fill(spec: AttentionSpec, layout: Layout, plan: Plan) -> dict[str, str]:
    """Text for every hole of the skeleton. Raises `SpecError` for what cannot be printed."""
    spec = spec.canonical()
    split = tiles.analyse(spec.keep)
    if plan.listed:  # a block that is kept whole has no mask at all, one that is not has all of it
        split = tiles.Tiles(split.bounds, spec.keep, sp.true)
    scale, score = scaled(spec.score)
    loader = CppLoader(spec, layout)
    weight = spec.weight.xreplace({ex.s: ex.s / scale})
    dispatch, visit = _dispatch(plan), visit_holes(plan)
    if spec.rows != sp.true:
        if plan.listed:
            raise SpecError("lists of keys are for tiles of consecutive queries")
        dispatch["COPIES"] += ROW_SCRATCH
        visit = {**visit, "VISIT_TILES": VISIT_TILES}
    return {
        **row_holes(spec, lambda: printer_of(spec, loader)),
        **normalizer_holes(spec, lambda: printer_of(spec, loader)),
        **_row(score, weight, split, spec, loader),
        **dispatch,
        **visit,
        "RANGE": range_of(split, spec, loader),
        "STATIC_MASK": "false" if split.static == sp.true else "true",
        "CHANGES": "false" if score == ex.s and split.residual == sp.true else "true",
        "SCALE": printer_of(spec, loader).literal(scale),
    }


def printer_of(spec: AttentionSpec, loader: CppLoader) -> Printer:
    """A printer of a spec's expressions: `s` and `k` are vectors, everything else is one number a row."""
    scalars = {ex.scalar(name): Value(f"a.{name}", "i") for name in spec.scalars}
    vectors = {ex.k: Value("k", "i", True), ex.s: Value("s", "f", True)}
    return Printer(CPP, {**_SCALARS, **scalars, **vectors}, loader)


def _row(score: sp.Expr, weight: sp.Expr, split: tiles.Tiles, spec: AttentionSpec, loader: CppLoader) -> dict[str, str]:
    """One vector of logits: score, then the part of the mask that needs data, then the static part; and its factor."""
    printer = printer_of(spec, loader)
    logit = printer.cast(printer.visit(score), "f", True)
    lines = [*printer.body, f"VF logit = {logit.code};"]
    block = printer.scope()
    factor = block.cast(block.visit(weight), "f", True).code if weight != 1 else ""
    lines += block.body
    for keep, opening in ((split.residual, "{"), (split.static, "if constexpr (kMasked) {")):
        if keep == sp.true:
            continue
        block = printer.scope()
        test = block.cast(block.visit(keep), "b", True)
        inner = [*block.body, f"logit = select({test.code}, logit, nothing);"]
        lines += [opening, *(f"  {line}" for line in inner), "}"]
    if any(mentions(line, "k") for line in (*lines, factor)):
        lines.insert(0, "const VI k = kIota + int32_t(k0 + j);")
    parts = {"WEIGHT_STORE": "", "WEIGHT_FACTOR": ""}
    if factor:
        parts = {"WEIGHT_STORE": f"    store(t.w + r * kBlockK + j, {factor});", "WEIGHT_FACTOR": f" * {factor}"}
    return {"ROW": indent(printer.row, 2), "ELEMENT": indent(lines, 4), **parts}


def mentions(line: str, name: str) -> bool:
    """Whether a C++ line uses this identifier."""
    for mark in "()[]{},;*+-&|<>=!~?:/":
        line = line.replace(mark, " ")
    return name in line.split()


def range_of(split: tiles.Tiles, spec: AttentionSpec, loader: CppLoader) -> str:
    """The body of `key_range`."""
    printer = printer_of(spec, loader)
    ends = [printer.visit(e).code for e in tiles.key_ranges(split.bounds)]
    return indent([*printer.row, f"return {{{', '.join(ends)}}};"], 2)


_COPIES = "  Element keys[kBlockK * kDepth], values[kBlockK * kWidth];"


def _dispatch(plan: Plan) -> dict[str, str]:
    """Tables of the blocks of `plan.rows` rows and of smaller ones for the last rows of a tile."""
    if plan.form == "stream":
        sizes = [n for n in (1, 2, 4, 8, 16) if n <= plan.rows]
        tables = [_table(f"k{kind}[{plan.rows + 1}]", f"{kind}Block", [_row_of(f"{kind.lower()}_block<{{n}}>", sizes)])
                  for kind in ("Score", "Value")]  # fmt: skip
        return {
            "STREAM_DISPATCH": "\n".join(tables),
            "FOLD": indent(_fold(plan.lanes), 2),
            "BLOCK_OF": "r",
            "COPIES": _COPIES,
        }
    if plan.form == "whole":
        blocks = _row_of("row_block<{n}>", list(range(1, plan.rows + 1)))
        table = _table(f"kRowBlock[{plan.rows + 1}]", "RowBlock", [blocks])
        return {"WHOLE_DISPATCH": table, **NEXT}
    sizes = sorted({plan.rows, *[n for n in (4, 2, 1) if n < plan.rows]})
    tables = [
        _table(f"k{kind}[2][{plan.rows + 1}]", f"{kind}Block",
               [_row_of(f"{kind.lower()}_block<{{n}}, {vectors}>", sizes) for vectors in (1, 2)])
        for kind in ("Score", "Value")
    ]  # fmt: skip
    return {"TILE_DISPATCH": "\n".join(tables), "BLOCK_OF": "r / kRows", "COPIES": "",
            "ONES": ", ".join(["1.0f"] * plan.rows), "NEXT": "", "NO_NEXT": "", "FEW_KEYS": ""}  # fmt: skip


def _row_of(call: str, sizes: list[int]) -> str:
    """One entry for each number of rows: the smallest block that holds them."""
    blocks = (call.format(n=next(n for n in sizes if n >= rows)) for rows in range(1, sizes[-1] + 1))
    return f"{{nullptr, {', '.join(blocks)}}}"


def _table(name: str, kind: str, rows: list[str]) -> str:
    inner = rows[0] if len(rows) == 1 else "{\n" + ",\n".join(f"  {row}" for row in rows) + "}"
    return f"const {kind} {name} = {inner};"


def _fold(lanes: int) -> list[str]:
    """Pairwise sums until one vector is left; the masks keep the sums in the order of the vectors."""
    lines = []
    width = lanes // 2
    while width:
        low = [s + i + o for s in range(0, lanes, 2 * width) for o in (0, lanes) for i in range(width)]
        high = [n + width for n in low]
        masks = (", ".join(map(str, m)) for m in (low, high))
        shuffles = " + ".join(f"SHUFFLE(x[i], x[i + {width}], {m})" for m in masks)
        lines += [f"for (int i = 0; i < {width}; ++i)", f"  x[i] = {shuffles};"]
        width //= 2
    return lines


def capture_types(spec: AttentionSpec, layout: Layout) -> list[tuple[str, str, int]]:
    """Name, C type and rank of every capture."""
    return [
        (c.name, C_TYPES[about.dtype], len(c.shape)) for c, about in zip(spec.captures, layout.captures, strict=True)
    ]
