"""The spec's own parts of a C++ kernel: what fills the holes of the skeleton."""

from __future__ import annotations

import itertools

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen.base import Layout, Plan
from attnopt.codegen.cpp_dialect import CPP
from attnopt.codegen.cpp_loads import C_TYPES, CppLoader
from attnopt.codegen.printer import Printer, Value
from attnopt.spec import AttentionSpec, EmptyRow, Softmax

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
    if len(found) != 1 or not next(iter(found)).is_finite:
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
    scale, score = scaled(spec.score)
    loader = CppLoader(spec, layout)
    return {
        **_row(score, split, spec, loader),
        **_dispatch(plan),
        **_result(spec, loader),
        "RANGE": _range(split, spec, loader),
        "STATIC_MASK": "false" if split.static == sp.true else "true",
        "CHANGES": "false" if score == ex.s and split.residual == sp.true else "true",
        "SCALE": _printer(spec, loader).literal(scale),
        **_in_place(spec, layout, plan),
    }


def _printer(spec: AttentionSpec, loader: CppLoader) -> Printer:
    scalars = {ex.scalar(name): Value(f"a.{name}", "i") for name in spec.scalars}
    vectors = {ex.k: Value("k", "i", True), ex.s: Value("s", "f", True)}
    return Printer(CPP, {**_SCALARS, **scalars, **vectors}, loader)


def _row(score: sp.Expr, split: tiles.Tiles, spec: AttentionSpec, loader: CppLoader) -> dict[str, str]:
    """One vector of logits: score, then the part of the mask that needs data, then the static part."""
    printer = _printer(spec, loader)
    logit = printer.cast(printer.visit(score), "f", True)
    lines = [*printer.body, f"VF logit = {logit.code};"]
    for keep, opening in ((split.residual, "{"), (split.static, "if constexpr (kMasked) {")):
        if keep == sp.true:
            continue
        block = printer.scope()
        test = block.cast(block.visit(keep), "b", True)
        inner = [*block.body, f"logit = select({test.code}, logit, nothing);"]
        lines += [opening, *(f"  {line}" for line in inner), "}"]
    if any(_mentions(line, "k") for line in lines):
        lines.insert(0, "const VI k = kIota + int32_t(k0 + j);")
    return {"ROW": _indent(printer.row, 2), "ELEMENT": _indent(lines, 4)}


def _mentions(line: str, name: str) -> bool:
    """Whether a C++ line uses this identifier."""
    for mark in "()[]{},;*+-&|<>=!~?:/":
        line = line.replace(mark, " ")
    return name in line.split()


def _range(split: tiles.Tiles, spec: AttentionSpec, loader: CppLoader) -> str:
    printer = _printer(spec, loader)
    ends = [printer.visit(e).code for e in tiles.key_ranges(split.bounds)]
    return _indent([*printer.row, f"return {{{', '.join(ends)}}};"], 2)


def _result(spec: AttentionSpec, loader: CppLoader) -> dict[str, str]:
    """Sink, gate, empty rows and lse."""
    sink, gate = _printer(spec, loader), _printer(spec, loader)
    parts = {"SINK": "", "FIRST_MAX": "-INFINITY", "FIRST_SUM": "0.0f", "GATE": "", "GATE_FACTOR": "", "LSE": ""}
    if isinstance(spec.normalizer, Softmax) and spec.normalizer.sink is not None:
        value = sink.cast(sink.visit(spec.normalizer.sink), "f", False)
        parts["SINK"] = _indent([*sink.row, f"const float sink = {value.code};"], 2)
        # The difference is NaN for a sink that is NaN or +inf, as a softmax over it would be.
        parts |= {"FIRST_MAX": "sink", "FIRST_SUM": "sink == -INFINITY ? 0.0f : 1.0f + (sink - sink)"}
    if spec.gate != 1:
        value = gate.cast(gate.visit(spec.gate), "f", False)
        parts["GATE"] = _indent([*gate.row, f"const float gate = {value.code};"], 4)
        parts["GATE_FACTOR"] = " * gate"
    if "lse" in spec.returns:
        line = "if (a.lse) a.lse[(b * kHeads + h) * n_q + q] = empty ? -INFINITY : t.max[r] + logf(t.sum[r]);"
        parts["LSE"] = _indent([line], 4)
    return {**parts, **_EMPTY[spec.empty_row]}


_MEAN = """\
  bool any_empty = false;
  for (int r = 0; r < rows; ++r) any_empty |= t.sum[r] == 0.0f;
  if (any_empty && n_k > 0) {
    double total[kWidth] = {};
    for (int64_t k = 0; k < n_k; ++k)
      for (int d = 0; d < kDv; ++d) total[d] += values[k * v_row + d];
    for (int d = 0; d < kDv; ++d) t.mean[d] = float(total[d] / double(n_k));
  }"""
# Without any key at all every row yields zeros, whatever the policy.
_EMPTY = {
    EmptyRow.ZERO: {"EMPTY_PREPARE": "", "EMPTY_ROW": "      if (empty) value = 0.0f;"},
    EmptyRow.NAN: {"EMPTY_PREPARE": "", "EMPTY_ROW": "      if (empty) value = n_k > 0 ? NAN : 0.0f;"},
    EmptyRow.UNIFORM: {"EMPTY_PREPARE": _MEAN, "EMPTY_ROW": "      if (empty) value = n_k > 0 ? t.mean[d] : 0.0f;"},
}


def _dispatch(plan: Plan) -> dict[str, str]:
    """Blocks of `plan.rows` rows, and smaller ones for the last rows of a tile."""
    sizes = [plan.rows, *[n for n in (4, 2, 1) if n < plan.rows]]
    texts = {}
    for hole, call in (
        ("SCORE_DISPATCH", "score_block<{n}, NV>(q, panel, s);"),
        ("VALUE_DISPATCH", "value_block<{n}, NV>(p, v, v_row, keys, scale, out);"),
    ):
        lines = [f"if (rows > {small}) return {call.format(n=n)}" for n, small in itertools.pairwise(sizes)]
        texts[hole] = _indent([*lines, call.format(n=sizes[-1])], 2)
    return texts


def _in_place(spec: AttentionSpec, layout: Layout, plan: Plan) -> dict[str, str]:
    if layout.dtype != "float32" or spec.heads.d_v % plan.lanes:
        return {"IN_PLACE": "INLINE bool values_in_place(const Args&) { return false; }", "DIRECT": ""}
    test = (
        "INLINE bool values_in_place(const Args& a) {\n"
        "  // Rows far apart share cache sets: copying them together pays once a few tiles of queries read them.\n"
        "  return a.v_stride[3] == 1 && (a.v_stride[2] == kDv || a.n_q * (kHeads / kValueHeads) <= 2 * kRows);\n"
        "}"
    )
    direct = (
        "  if (values_in_place(a)) {\n"
        "    values = a.v + b * a.v_stride[0] + value_head(h) * a.v_stride[1];\n"
        "    v_row = a.v_stride[2];\n"
        "  }"
    )
    return {"IN_PLACE": test, "DIRECT": direct}


def capture_types(spec: AttentionSpec, layout: Layout) -> list[tuple[str, str, int]]:
    """Name, C type and rank of every capture."""
    return [
        (c.name, C_TYPES[about.dtype], len(c.shape)) for c, about in zip(spec.captures, layout.captures, strict=True)
    ]


def _indent(lines: list[str], width: int) -> str:
    return "\n".join(" " * width + line for line in lines)
