"""C++ kernels of column mass and weights: weights again, from the maximum and the sum of each row.

C ABI, strides in elements (any value, zero and negative included):

    int32_t attnopt_side(const void* const* tensors, void* result, const int64_t* meta, int32_t weights,
                         int32_t threads)

`tensors` are q, k and the captures, then `[B, H, n_q, 2]` in fp32: the maximum of each row and the logarithm of its sum
from there (null for a normaliser that is no softmax). `meta` is `B, n_q, n_k`, the four strides of each of q and k, the
strides of each capture in order, and the scalars. The result is contiguous: where `weights` is not 0 they are
`[B, H, n_q, n_k]`, of the type of q, else `[B, H, n_k]` in fp32: the sum over queries, to which rows without keys have
not been added. It returns 0, 1 without memory, 2 for an argument that cannot be.
"""

from __future__ import annotations

import math

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.analysis.plain import weights_of
from attnopt.codegen import cpp
from attnopt.codegen.base import ABI, Kernel, Layout, Plan
from attnopt.codegen.cpp_backward_blocks import FINE, PACK, PRODUCT
from attnopt.codegen.cpp_backward_holes import _NOTHING, _TAIL, _masks, _vector, _with_keys
from attnopt.codegen.cpp_holes import capture_types, printer_of, range_of, scaled
from attnopt.codegen.cpp_loads import CppLoader
from attnopt.codegen.cpp_normalizer import indent
from attnopt.codegen.cpp_prelude import prelude
from attnopt.codegen.cpp_side_skeleton import SIDE
from attnopt.codegen.cpp_text import ELEMENTS, fill_holes, head_map, header, tidy
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

_NAMES = frozenset({"rows", "mass", "weights", "shift", "inverse", "spoilt", "x"})
_FILL = {EmptyRow.ZERO: "0.0f", EmptyRow.NAN: "NAN", EmptyRow.UNIFORM: "1.0f / float(n_k)"}
# Rows whose weights are one number: those without keys, and those that a NaN or an infinity has spoilt. Of a column
# they are nothing here.
_KNOWN = """\
  const float* const known = a.rows + ((b * kHeads + h) * n_q + q) * 2;
  const float shift = known[0], inverse = expf(-known[1]);
  const bool spoilt = shift != shift || known[1] != known[1];
  if (spoilt || shift == -INFINITY) {{
    const float blank = a.mass ? 0.0f : spoilt ? NAN : {fill};
    for (int j = 0; j < last; j += kLanes) store(x + j, splat_f(blank));
    return;
  }}"""


def supported_side(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there is no C++ kernel for column mass and weights; None if there is one."""
    spec = weights_of(spec)
    problem = cpp.supported(spec, layout)
    if problem is not None:
        return problem
    if isinstance(spec.normalizer, Pointwise) and ex.depends(spec.normalizer.divide, ex.t, ex.a):
        return "the C++ kernel has no weights whose divisor is made from them"
    if isinstance(spec.normalizer, Pointwise) and spec.rows != sp.true:
        return "the C++ kernel has pointwise weights where every query is computed"
    for name in (*(c.name for c in spec.captures), *spec.scalars):
        if name in _NAMES:
            return f"the C++ kernel cannot use {name!r} as the name of a capture or scalar"
    return None


def emit_side(spec: AttentionSpec, layout: Layout, plan: Plan, source_note: str = "") -> Kernel:
    """The kernel of a spec's weights. Raises `SpecError` where `supported_side` gives a reason.

    Args:
        spec: whose weights to make; what comes after them is left out.
        layout: dtypes and unit strides to specialise for.
        plan: schedule, of the form `backward`: its tiles serve here as well.
        source_note: where the site stands in the user's code, for the header.
    """
    reason = supported_side(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec = weights_of(spec)
    holes = _fill(spec, layout)
    half = "float16" in (layout.dtype, *(c.dtype for c in layout.captures))
    body = "\n".join(
        [
            header("side outputs", spec, layout, plan, source_note),
            prelude(plan.lanes, half),
            _constants(spec, layout, plan, holes),
            _args(spec, layout),
            fill_holes(PACK + FINE + PRODUCT + SIDE, holes),
            _entry(spec, layout),
        ]
    )
    return Kernel("cpp", tidy(body), spec.key, layout, plan)


def _fill(spec: AttentionSpec, layout: Layout) -> dict[str, str]:
    """Text for every hole of the skeleton."""
    split, loader = tiles.analyse(spec.keep), CppLoader(spec, layout)
    (scale, score), softmax = scaled(spec.score), isinstance(spec.normalizer, Softmax)
    printer = printer_of(spec, loader)
    logit = _vector(printer, score)
    lines = [*printer.body, f"{'VF' if softmax else 'const VF'} logit = {logit};"]
    lines += [_NOTHING] if softmax else ["VI kept = splat_b(true);"]
    lines += _masks(printer, split, softmax)
    if softmax:
        known = _KNOWN.format(fill=_FILL[spec.empty_row])
        lines += [_TAIL, "const VF p = exp_fine(logit - shift) * inverse;"]
    else:
        known, kept = _divided(spec, loader), "kept & (kIota < valid)"
        lines += [f"if constexpr (kRagged) kept = {kept};", "const VF p = select(kept, logit * inverse, VF{});"]
    return {
        "KNOWN": known,
        "ROW": indent(printer.row, 2),
        "ELEMENT": indent(_with_keys(lines), 4),
        "RANGE": range_of(split, spec, loader),
        "STATIC_MASK": "false" if split.static == sp.true else "true",
        "SCALE": printer_of(spec, loader).literal(scale),
    }


def _divided(spec: AttentionSpec, loader: CppLoader) -> str:
    """What pointwise weights are multiplied by."""
    assert isinstance(spec.normalizer, Pointwise)
    printer = printer_of(spec, loader)
    divide = printer.cast(printer.visit(spec.normalizer.divide), "f", False).code
    lines = ["const float inverse = [&] {", *(f"  {x}" for x in printer.row), f"  return 1.0f / {divide};", "}();"]
    return indent(lines, 2)


def _constants(spec: AttentionSpec, layout: Layout, plan: Plan, holes: dict[str, str]) -> str:
    heads, panel = spec.heads, 2 * plan.lanes
    unit = math.lcm(panel, plan.rows)
    return f"""\
// ---- this attention -------------------------------------------------------------------------------
typedef {ELEMENTS[layout.dtype]} Element;  // of q, k and weights
constexpr int kHeads = {heads.q}, kD = {heads.d_qk};
constexpr int kDeep = {-(-heads.d_qk // plan.lanes) * plan.lanes};  // kD in whole vectors
constexpr int kRows = {plan.rows}, kPanel = {panel};
constexpr int kBlockQ = {-(-plan.block_q // plan.rows) * plan.rows}, kBlockK = {-(-plan.block_k // unit) * unit};
constexpr float kScale = {holes["SCALE"]};  // constant factor of the scores, folded into q
constexpr bool kStaticMask = {holes["STATIC_MASK"]};  // some of the mask is decided by coordinates
struct Whole {{ static constexpr bool value = false; }};
struct Ragged {{ static constexpr bool value = true; }};
{head_map("key_head", heads.k_map, heads.q, heads.k)}"""


def _args(spec: AttentionSpec, layout: Layout) -> str:
    captures = capture_types(spec, layout)
    fields = [f"  const {c_type}* {name};\n  int64_t {name}_stride[{max(rank, 1)}];" for name, c_type, rank in captures]
    fields += [f"  int64_t {name};" for name in spec.scalars]
    return "\n".join(
        [
            "",
            "struct Args {",
            "  int64_t n_b, n_q, n_k;",
            "  const Element *q, *k;",
            "  const float* rows;",
            "  Element* weights;  // one of the two is null",
            "  float* mass;",
            "  int64_t q_stride[4], k_stride[4];",
            *fields,
            "};",
        ]
    )


def _entry(spec: AttentionSpec, layout: Layout) -> str:
    reads = []
    for name, c_type, rank in capture_types(spec, layout):
        reads.append(f"  a.{name} = static_cast<const {c_type}*>(*tensors++);")
        reads.append(f"  for (int i = 0; i < {rank}; ++i) a.{name}_stride[i] = *meta++;")
    reads += [f"  a.{name} = *meta++;" for name in spec.scalars]
    needed = " || !a.rows" if isinstance(spec.normalizer, Softmax) else ""
    return f"""
extern "C" int32_t attnopt_abi() {{ return {ABI}; }}

extern "C" const char* attnopt_key() {{ return "{spec.key}"; }}

extern "C" int32_t attnopt_side(const void* const* tensors, void* result, const int64_t* meta, int32_t weights,
                                int32_t threads) {{
  if (!tensors || !result || !meta || threads < 1) return 2;
  Args a{{}};
  a.n_b = *meta++, a.n_q = *meta++, a.n_k = *meta++;
  if (a.n_b < 1 || a.n_q < 1 || a.n_k < 1 || a.n_k > INT32_MAX / 2 || a.n_q > INT32_MAX / 2) return 2;
  int64_t* const strides[2] = {{a.q_stride, a.k_stride}};
  for (int i = 0; i < 8; ++i) strides[i / 4][i % 4] = *meta++;
  a.q = static_cast<const Element*>(*tensors++);
  a.k = static_cast<const Element*>(*tensors++);
{chr(10).join(reads)}
  a.rows = static_cast<const float*>(*tensors++);
  a.weights = weights ? static_cast<Element*>(result) : nullptr;
  a.mass = weights ? nullptr : static_cast<float*>(result);
  if (!a.q || !a.k{needed}) return 2;
  return run(a, threads);
}}"""
