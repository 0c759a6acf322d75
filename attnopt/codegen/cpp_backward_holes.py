"""The spec's own parts of a C++ backward kernel: what fills the holes of its skeleton."""

from __future__ import annotations

from collections.abc import Sequence

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_holes import mentions, printer_of, range_of, scaled
from attnopt.codegen.cpp_loads import CppLoader
from attnopt.codegen.cpp_normalizer import indent
from attnopt.codegen.cpp_tables import copy_holes, sink_gradient, table_gradients
from attnopt.codegen.cpp_text import fill_holes
from attnopt.codegen.derivative import derivative
from attnopt.codegen.printer import Printer
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

_NOTHING = "const VF nothing = splat_f(-INFINITY);"
_TAIL = "if constexpr (kRagged) logit = select(kIota < valid, logit, nothing);"
_SOFTMAX = [
    _TAIL,
    "const VF p = exp_fine(logit - row.shift) * row.inverse;",
    "VI kept = p != 0.0f;",
    "if constexpr (kRagged) kept = kept & (kIota < valid);",
]
_POINTWISE = ["if constexpr (kRagged) kept = kept & (kIota < valid);", "const VF p = select(kept, logit, VF{});"]
_DELTA = """\
  const Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
  const float lse = a.lse[row];
  t.lse[q] = lse == -INFINITY ? INFINITY : lse;
  t.delta[q] = inner(grad, a.grad_stride[3], out, a.out_stride[3]) - (a.dlse ? a.dlse[row] : 0.0f);"""
# The sums of a row whose keys are all here are taken again: then they fit its weights to the last digit, as in eager
# PyTorch, where the only key of a row has a weight of one and no gradient.
_SETTLE = """\
template <bool kMasked>
Row settle(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, const float* x,
           const float* y, const Worker& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  float z[kBlockK]@SETTLE_MEMORY@;
@SETTLE_ROW@
  VF top = splat_f(@SETTLE_TOP@);
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    const VF s = load(x + j);
@SETTLE_ELEMENT@
    store(z + j, logit);
@SETTLE_STORE@
    top = select(logit > top, logit, top);
  };
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{});
  const float most = max_lanes(top), shift = most == -INFINITY ? 0.0f : most;
  VF sums{}, deltas{};
  for (j = begin; j < end; j += kLanes) {
    const VF p = exp_fine(load(z + j) - shift);
    store(z + j, p);
    sums += p;
  }
  const float sum = sum_lanes(sums)@SETTLE_SUM@, inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (j = begin; j < end; j += kLanes) {
    const VF p = load(z + j) * inverse;
    deltas += select(to_bool(p != 0.0f), p * load(y + j)@SETTLE_WEIGHT@, VF{});
  }
  return {shift, sum_lanes(deltas) - (a.dlse ? a.dlse[(b * kHeads + h) * n_q + q] : 0.0f), inverse};
}
"""
_ALONE = (
    "  if (alone && begin < end && row.shift < INFINITY) row = settle<kMasked>(a, b, h, q, k0, begin, end, x, y, t);"
)
_UNIFORM = """\
  if (lse == -INFINITY)  // all values have the same share of the row
    for (int d = 0; d < kDv; ++d) t.uniform[d] += factor * read_f(grad[d * a.grad_stride[3]]) / float(n_k);"""
# A row that is NaN before its weights are multiplied.
_NOT_A_NUMBER = """\
  if (lse == -INFINITY) {
    t.lse[q] = NAN;
    for (int d = 0; d < kDv; ++d) t.uniform[d] = NAN;
  }"""
_SPREAD = """\
    for (int c = 0; c < kWidth; c += kPanel) {
      const int width = kWidth - c < kPanel ? kWidth - c : kPanel;
      for (int k = 0; k < count; ++k)
        for (int d = 0; d < width; ++d) dv[c * kBlockK + k * width + d] += t.uniform[c + d];
    }"""


def fill_backward(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> dict[str, str]:
    """Text for every hole of the skeleton. Raises `SpecError` for what cannot be printed or differentiated."""
    spec = spec.canonical()
    split = tiles.analyse(spec.keep)
    loader = CppLoader(spec, layout)
    return {
        **_settle(spec, split, loader),
        **_row(spec, split, loader, learned),
        **_known(spec, loader, learned),
        **copy_holes(spec, learned),
        "RANGE": range_of(split, spec, loader),
        "STATIC_MASK": "false" if split.static == sp.true else "true",
        "SCALE": printer_of(spec, loader).literal(scaled(spec.score)[0]),
    }


def _row(spec: AttentionSpec, split: tiles.Tiles, loader: CppLoader, learned: Sequence[str]) -> dict[str, str]:
    """One vector: logits again, weights from lse, and the gradients of scores and of tables."""
    scale, score = scaled(spec.score)
    weight, softmax = spec.weight.xreplace({ex.s: ex.s / scale}), isinstance(spec.normalizer, Softmax)
    printer = printer_of(spec, loader)
    logit = _vector(printer, score)
    slope, factor, change = derivative(score, ex.s), "", ""
    if weight != 1:
        factor = _vector(printer, weight)
        dweight = derivative(weight, ex.s)
        change = f" + p * dp * {_vector(printer, dweight)}" if dweight != 0 else ""
    steep = "" if slope == 1 else f" * {_vector(printer, slope)}"
    tables = table_gradients(printer, score, weight, ex.loads(score, weight), learned)
    lines = [*printer.body, f"{'VF' if softmax else 'const VF'} logit = {logit};"]
    lines += [_NOTHING] if softmax else ["VI kept = splat_b(true);"]
    lines += _masks(printer, split, softmax) + (_SOFTMAX if softmax else _POINTWISE)
    dp = f"dp * {factor}" if factor else "dp"
    lines.append(f"const VF dlogit = select(kept, {f'p * ({dp} - row.delta)' if softmax else dp}, VF{{}});")
    ds = f"dlogit{steep}{change}"
    lines.append(f"store(x + j, {f'select(kept, p * {factor}, VF{{}})' if factor else 'p'});")
    lines.append(f"store(y + j, {ds if ds == 'dlogit' else f'select(kept, {ds}, VF{{}})'});")
    lines += tables.body
    return {
        "ROW": indent(printer.row, 2),
        "ROW_TABLES": indent(tables.row, 2),
        "ELEMENT": indent(_with_keys(lines), 4),
        "ROW_END": indent(tables.end, 2),
    }


def _settle(spec: AttentionSpec, split: tiles.Tiles, loader: CppLoader) -> dict[str, str]:
    """The function `settle`, where there are sums to take again."""
    if not isinstance(spec.normalizer, Softmax):
        return {"SETTLE": "", "ALONE": ""}
    scale, score = scaled(spec.score)
    weighted, sink = spec.weight != 1, spec.normalizer.sink is not None
    printer = printer_of(spec, loader)
    logit, factor = _vector(printer, score), _vector(printer, spec.weight.xreplace({ex.s: ex.s / scale}))
    lines = [*printer.body, f"VF logit = {logit};", _NOTHING, *_masks(printer, split, True), _TAIL]
    parts = {
        "SETTLE_ROW": indent(printer.row, 2),
        "SETTLE_ELEMENT": indent(_with_keys(lines), 4),
        "SETTLE_MEMORY": ", w[kBlockK]" if weighted else "",
        "SETTLE_STORE": f"    store(w + j, {factor});" if weighted else "",
        "SETTLE_WEIGHT": " * load(w + j)" if weighted else "",
        "SETTLE_TOP": "t.sink[q]" if sink else "-INFINITY",
        "SETTLE_SUM": " + expf(t.sink[q] - shift)" if sink else "",
    }
    return {"SETTLE": fill_holes(_SETTLE, parts), "ALONE": _ALONE}


def _with_keys(lines: list[str]) -> list[str]:
    """The statements of an element, after that of its keys where any of them mentions it."""
    return ["const VI k = kIota + int32_t(k0 + j);"] * any(mentions(line, "k") for line in lines) + lines


def _vector(printer: Printer, expr: sp.Expr) -> str:
    return printer.cast(printer.visit(expr), "f", True).code


def _masks(printer: Printer, split: tiles.Tiles, softmax: bool) -> list[str]:
    lines: list[str] = []
    for keep, opening in ((split.residual, "{"), (split.static, "if constexpr (kMasked) {")):
        if keep == sp.true:
            continue
        block = printer.scope()
        test = block.cast(block.visit(keep), "b", True).code
        hidden = f"logit = select({test}, logit, nothing);" if softmax else f"kept = kept & {test};"
        lines += [opening, *(f"  {line}" for line in (*block.body, hidden)), "}"]
    return lines


def _known(spec: AttentionSpec, loader: CppLoader, learned: Sequence[str]) -> dict[str, str]:
    """What is known of a row beforehand: its gate, its lse, and what its weights' gradients are measured from."""
    printer = printer_of(spec, loader)
    factors = []
    if spec.gate != 1:
        factors.append(f" * {printer.cast(printer.visit(spec.gate), 'f', False).code}")
    if isinstance(spec.normalizer, Pointwise):
        if spec.normalizer.divide != 1:
            factors.append(f" / {printer.cast(printer.visit(spec.normalizer.divide), 'f', False).code}")
        parts, spread = ["  t.lse[q] = t.delta[q] = 0.0f;"], ""
    else:
        assert isinstance(spec.normalizer, Softmax)
        parts = [_DELTA]
        uniform, nan = spec.empty_row is EmptyRow.UNIFORM, spec.empty_row is EmptyRow.NAN and spec.weight != 1
        parts += [_UNIFORM] if uniform else [_NOT_A_NUMBER] if nan else []
        spread = _SPREAD if uniform or nan else ""
        if spec.normalizer.sink is not None:
            sink = printer_of(spec, loader)
            value = sink.cast(sink.visit(spec.normalizer.sink), "f", False).code
            parts.append(indent(["{", *(f"  {line}" for line in sink.row), f"  t.sink[q] = {value};", "}"], 2))
        parts.append(indent(sink_gradient(spec, printer_of(spec, loader), learned), 2))
    return {
        "GATE": indent(printer.row, 2),
        "GATE_FACTOR": "".join(factors),
        "KNOWN": "\n".join(parts),
        "SPREAD": spread,
    }
