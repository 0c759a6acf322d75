"""How a row's scores become weights, in C++: the holes that differ between a softmax and a pointwise normaliser."""

from __future__ import annotations

from collections.abc import Callable

from attnopt import expr as ex
from attnopt.codegen.cpp_rows import POINTWISE, SOFTMAX
from attnopt.codegen.cpp_side_outputs import spends, spent_holes, stored
from attnopt.codegen.printer import Printer, Value
from attnopt.returns import of_rows
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

MakePrinter = Callable[[], Printer]

# What an empty row yields. Without any key at all every row yields zeros, whatever the policy.
_FILL = {
    EmptyRow.ZERO: "0.0f",
    EmptyRow.NAN: "n_k > 0 ? NAN : 0.0f",
    EmptyRow.UNIFORM: "n_k > 0 ? t.mean[d] : 0.0f",
}
_EMPTY = """\
  if (empty) {{
{prepare}    for (int d = 0; d < kDv; ++d) write(out + d * a.out_stride[3], ({fill}){gate});
    return;
  }}"""
_AVERAGE = "    if (!t.averaged) average(a, b, h, t.mean);\n    t.averaged = true;\n"
_KEEP_MAX = """\
  part.max = t.max[r];
  part.sum = sum_lanes(load(t.sum + r * kLanes));@SPENT_KEEP@"""
_JOIN_MAX = """\
  const float old = t.max[r], next = part.max > old ? part.max : old, shift = next == -INFINITY ? 0.0f : next;
  const float mine = exp_negative(splat_f(old - shift))[0], other = exp_negative(splat_f(part.max - shift))[0];
  t.max[r] = next;@SPENT_JOIN@
  t.sum[r * kLanes] = t.sum[r * kLanes] * mine + part.sum * other;
  for (int d = 0; d < kWidth; ++d) t.out[r * kWidth + d] = t.out[r * kWidth + d] * mine + part.out[d] * other;"""
_SETTLE = """\
// The maximum of a row that has no other tile of keys; what it started with, a sink, is older.
INLINE void settle(int r, Scratch& t) {
  const float old = t.max[r], top = max_lanes(load(t.top + r * kLanes)), next = top > old ? top : old;
  t.max[r] = next;
  t.shift[r] = next == -INFINITY ? 0.0f : next;
  t.scale[r] = old == -INFINITY || next == old ? 1.0f : exp_negative(splat_f(old - next))[0];@GROW_ONE@
}"""
_KEEP_SUM = "  part.sum = sum_lanes(load(t.sum + r * kLanes));{size}"
_KEEP_SIZE = "\n  part.size = sum_lanes(load(t.size + r * kLanes));"
_JOIN_SUM = """\
  t.sum[r * kLanes] += part.sum;{size}
  for (int d = 0; d < kWidth; ++d) t.out[r * kWidth + d] += part.out[d];"""
_JOIN_SIZE = "\n  t.size[r * kLanes] += part.size;"


def normalizer_holes(spec: AttentionSpec, printer: MakePrinter) -> dict[str, str]:
    """Text of `ROWS`, `SCRATCH`, `START`, `RESCALE`, `SETTLE`, `FINISH`, `GATE`, `EMPTY` and `LSE`."""
    gate, statements = "", ""
    if spec.gate != 1:
        p = printer()
        value = p.cast(p.visit(spec.gate), "f", False)
        statements, gate = indent([*p.row, f"const float gate = {value.code};"], 2), " * gate"
    make = _softmax if isinstance(spec.normalizer, Softmax) else _pointwise
    holes = {"GATE": statements, "GATE_FACTOR": gate, **make(spec, printer, gate)}
    if not of_rows(spec.returns):
        holes["LSE"] = ""
    return holes


def _softmax(spec: AttentionSpec, printer: MakePrinter, gate: str) -> dict[str, str]:
    first_max, first_sum, start = "-INFINITY", "0.0f", []
    assert isinstance(spec.normalizer, Softmax)
    if spec.normalizer.sink is not None:
        p = printer()
        value = p.cast(p.visit(spec.normalizer.sink), "f", False)
        start = [*p.row, f"const float sink = {value.code};"]
        # The difference is NaN for a sink that is NaN or +inf, as a softmax over it would be.
        first_max, first_sum = "sink", "sink == -INFINITY ? 0.0f : 1.0f + (sink - sink)"
    start += [f"t.max[r] = {first_max};", "store(t.top + r * kLanes, splat_f(-INFINITY));"]
    start += [f"t.sum[r * kLanes] = {first_sum};"] if first_sum != "0.0f" else []
    finish = [
        "const float sum = sum_lanes(load(t.sum + r * kLanes));",
        "const bool empty = sum == 0.0f;",
        "const float inverse = 1.0f / sum;",
    ]
    if spec.empty_row is EmptyRow.UNIFORM:
        start.append("t.averaged = false;")
    start += ["store(t.spent + r * kLanes, VF{});"] * spends(spec)
    weighted, uniform = spec.weight != 1, spec.empty_row is EmptyRow.UNIFORM
    return {
        "ROWS": SOFTMAX,
        "SCRATCH": "  float top[kStats * kLanes], max[kStats], shift[kStats];"
        + ("\n  float spent[kStats * kLanes], grow[kStats];" if spends(spec) else "")
        + ("\n  float w[kTileQ * kBlockK];" if weighted else "")
        + ("\n  float mean[kWidth];\n  bool averaged;" if uniform else ""),
        "WEIGHT_LOAD": " * load(t.w + r * kBlockK + j)" if weighted else "",
        "START": indent(start, 2),
        "RESCALE": "  for (int r = 0; r < rows; r += kLanes) raise(r, t);\n"
        "  for (int r = 0; r < rows; ++r) weigh(begin[@BLOCK_OF@], end[@BLOCK_OF@], r, t);",
        "SETTLE": _SETTLE,
        "RESCALE_BLOCK": "  for (int r = 0; r < R; ++r) settle(r, t);\n"
        "  for (int r = 0; r < R; ++r) {\n    fetch_part(a, t, q0 + r);\n    weigh(begin, end, r, t);\n  }",
        "START_PART": "  t.max[r] = -INFINITY;\n  store(t.sum + r * kLanes, VF{});",
        "KEEP_PART": _KEEP_MAX,
        "JOIN_PART": _JOIN_MAX,
        "FINISH": indent(finish, 2),
        "EMPTY": _EMPTY.format(fill=_FILL[spec.empty_row], gate=gate, prepare=_AVERAGE if uniform else ""),
        "LSE": stored(spec, "empty ? -INFINITY : t.max[r] + logf(sum)"),
        **spent_holes(spec),
    }


def _pointwise(spec: AttentionSpec, printer: MakePrinter, gate: str) -> dict[str, str]:
    assert isinstance(spec.normalizer, Pointwise)
    p = printer()
    total, absolute = Value("total", "f"), Value("absolute", "f")
    p.symbols = {**p.symbols, ex.t: total, ex.a: absolute}
    divide = spec.normalizer.divide
    value = p.cast(p.visit(divide), "f", False)
    finish = [
        f"const float {name} = sum_lanes(load(t.{field} + r * kLanes));"
        for symbol, name, field in ((ex.t, "total", "sum"), (ex.a, "absolute", "size"))
        if ex.depends(divide, symbol)
    ]
    finish += [*p.row, f"const float divisor = {value.code};", "const float inverse = 1.0f / divisor;"]
    sizes = ex.depends(divide, ex.a)
    return {
        "ROWS": POINTWISE,
        "SCRATCH": "  float size[kStats * kLanes];" if sizes else "",
        "SIZE_START": ", size = load(t.size + r * kLanes)" if sizes else "",
        "SIZE_ADD": "    size += abs_(logit);" if sizes else "",
        "SIZE_STORE": "  store(t.size + r * kLanes, size);" if sizes else "",
        "START": "  store(t.size + r * kLanes, VF{});" if sizes else "",
        "RESCALE": "",
        "SETTLE": "",
        "RESCALE_BLOCK": "  for (int r = 0; r < R; ++r) fetch_part(a, t, q0 + r);",
        "START_PART": "",
        "KEEP_PART": _KEEP_SUM.format(size=_KEEP_SIZE if sizes else ""),
        "JOIN_PART": _JOIN_SUM.format(size=_JOIN_SIZE if sizes else ""),
        "FINISH": indent(finish, 2),
        "EMPTY": "",
        "LSE": stored(spec, "logf(fabsf(divisor))"),
    }


def indent(lines: list[str], width: int) -> str:
    """The lines as one text, each moved to the right."""
    return "\n".join(" " * width + line for line in lines)
