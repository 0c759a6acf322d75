"""C++ kernels for the gradients of an attention, from its result and lse.

C ABI, strides in elements (any value, zero and negative included):

    int32_t attnopt_backward(const void* const* tensors, const int64_t* meta, int32_t threads)

`tensors` are q, k, v and the captures; out and the gradient of it; lse and the gradient of it or null, both contiguous
`[B, H, n_q]` in fp32; then the results: gradients of q, k and v, contiguous, and of the learned captures, contiguous,
of the type that `sum_type` gives and zero before. `meta` is `B, n_q, n_k`, the four strides of each of q, k, v, out and
its gradient, the strides of each capture, the scalars, and of each learned capture the strides of its gradient and the
number of its elements. The result is 0, 1 without memory, 2 for an argument that cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import ABI, Kernel, Layout, Plan
from attnopt.codegen.cpp_backward_blocks import BLOCKS
from attnopt.codegen.cpp_backward_driver import DRIVER
from attnopt.codegen.cpp_backward_holes import fill_backward
from attnopt.codegen.cpp_backward_skeleton import TILE
from attnopt.codegen.cpp_holes import capture_types
from attnopt.codegen.cpp_prelude import prelude
from attnopt.codegen.cpp_tables import sum_type, unplaced
from attnopt.codegen.cpp_text import ELEMENTS, fill_holes, head_map, header, tidy
from attnopt.codegen.derivative import derivative
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, Pointwise, Softmax

_NAMES = frozenset({"grad", "dlse", "dq", "dk", "dv"})


def undifferentiable(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> str | None:
    """Why there is no C++ kernel for these gradients; None if there is one. `learned`: captures with a gradient."""
    problem = cpp.supported(spec, layout)
    if problem is not None:
        return problem
    if spec.rows != sp.true:
        return "the C++ kernel has gradients where every query is computed"
    heads = spec.heads
    if heads.k != heads.v or heads.k_map != heads.v_map:
        return "the C++ kernel has gradients of keys and values where both have one head map"
    if not isinstance(spec.normalizer, (Softmax, Pointwise)):
        return "the C++ kernel has gradients of a softmax and of pointwise weights"
    if isinstance(spec.normalizer, Pointwise) and ex.depends(spec.normalizer.divide, ex.t, ex.a):
        return "the C++ kernel has no gradient of a divisor that is made from the weights"
    if isinstance(spec.normalizer, Pointwise) and _overflows(derivative(spec.score, ex.s)):
        return "the C++ kernel has no gradient of pointwise weights that grow as exponentials of the scores"
    for name in (*(c.name for c in spec.captures), *spec.scalars):
        if name in _NAMES or name.startswith("grad_"):
            return f"the C++ kernel cannot use {name!r} as the name of a capture or scalar"
    problem = unplaced(spec.canonical(), learned)
    if problem is not None:
        return problem
    try:
        fill_backward(spec, layout, learned)
    except SpecError as error:
        return str(error)
    return None


def _overflows(slope: sp.Expr) -> bool:
    """Whether a slope has exponentials or logarithms of the score elsewhere than in sums that it divides by."""
    sums = [x for x in slope.atoms(sp.Pow) if x.exp == -1 and all(_positive(term) for term in sp.Add.make_args(x.base))]
    rest = slope.xreplace({x: sp.Dummy() for x in sums})
    return any(ex.depends(x, ex.s) for x in rest.atoms(sp.exp, sp.log))


def _positive(term: sp.Expr) -> bool:
    factor, power = term.as_coeff_Mul()
    return bool(factor.is_positive) and (power == 1 or isinstance(power, sp.exp))


def emit_backward(
    spec: AttentionSpec, layout: Layout, plan: Plan, learned: Sequence[str] = (), source_note: str = ""
) -> Kernel:
    """The kernel of a spec's gradients. Raises `SpecError` where `undifferentiable` gives a reason.

    Args:
        spec: what was computed.
        layout: dtypes and unit strides to specialise for.
        plan: schedule, of the form `backward`.
        learned: names of the captures whose gradients are wanted, in the order of the captures.
        source_note: where the site stands in the user's code, for the header.
    """
    reason = undifferentiable(spec, layout, learned)
    if reason is not None:
        raise SpecError(f"{reason}.")
    spec = spec.canonical()
    holes = fill_backward(spec, layout, learned)
    half = "float16" in (layout.dtype, *(c.dtype for c in layout.captures))
    body = "\n".join(
        [
            header("backward", spec, layout, plan, source_note),
            prelude(plan.lanes, half),
            _constants(spec, layout, plan, holes),
            _args(spec, layout, learned),
            fill_holes(BLOCKS + TILE + DRIVER, holes),
            _entry(spec, layout, learned),
        ]
    )
    return Kernel("cpp", tidy(body), spec.key, layout, plan)


def _constants(spec: AttentionSpec, layout: Layout, plan: Plan, holes: dict[str, str]) -> str:
    heads, panel = spec.heads, 2 * plan.lanes
    # A tile of keys is cut by rows of the register tile where it is summed over queries, by panels elsewhere.
    unit = math.lcm(panel, plan.rows)
    deep, width = (-(-d // plan.lanes) * plan.lanes for d in (heads.d_qk, heads.d_v))
    return f"""\
// ---- this attention -------------------------------------------------------------------------------
typedef {ELEMENTS[layout.dtype]} Element;  // of q, k, v, out and their gradients
constexpr int kHeads = {heads.q}, kKeyHeads = {heads.k}, kD = {heads.d_qk}, kDv = {heads.d_v};
constexpr int kDeep = {deep}, kWidth = {width};  // kD and kDv in whole vectors
constexpr int kRows = {plan.rows}, kPanel = {panel};
constexpr int kBlockQ = {-(-plan.block_q // plan.rows) * plan.rows}, kBlockK = {-(-plan.block_k // unit) * unit};
constexpr float kScale = {holes["SCALE"]};  // constant factor of the scores, folded into q
constexpr bool kStaticMask = {holes["STATIC_MASK"]};  // some of the mask is decided by coordinates
struct Whole {{ static constexpr bool value = false; }};
struct Ragged {{ static constexpr bool value = true; }};
{head_map("key_head", heads.k_map, heads.q, heads.k)}"""


def _args(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> str:
    captures = capture_types(spec, layout)
    fields = [f"  const {c_type}* {name};\n  int64_t {name}_stride[{max(rank, 1)}];" for name, c_type, rank in captures]
    fields += [f"  int64_t {name};" for name in spec.scalars]
    for name, _, rank in captures:
        if name in learned:
            fields.append(f"  {sum_type(spec, name)}* grad_{name};")
            fields.append(f"  int64_t grad_{name}_stride[{max(rank, 1)}], grad_{name}_size;")
    return "\n".join(
        [
            "",
            "struct Args {",
            "  int64_t n_b, n_q, n_k;",
            "  const Element *q, *k, *v, *out, *grad;",
            "  const float *lse, *dlse;",
            "  Element *dq, *dk, *dv;",
            "  int64_t q_stride[4], k_stride[4], v_stride[4], out_stride[4], grad_stride[4];",
            *fields,
            "};",
        ]
    )


def _entry(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> str:
    captures = capture_types(spec, layout)
    reads = []
    for name, c_type, rank in captures:
        reads.append(f"  a.{name} = static_cast<const {c_type}*>(*tensors++);")
        reads.append(f"  for (int i = 0; i < {rank}; ++i) a.{name}_stride[i] = *meta++;")
    reads += [f"  a.{name} = *meta++;" for name in spec.scalars]
    grads = []
    for name, _, rank in captures:
        if name in learned:
            grads.append(f"  a.grad_{name} = static_cast<{sum_type(spec, name)}*>(const_cast<void*>(*tensors++));")
            grads.append(f"  for (int i = 0; i < {rank}; ++i) a.grad_{name}_stride[i] = *meta++;")
            grads.append(f"  a.grad_{name}_size = *meta++;")
    return f"""
extern "C" int32_t attnopt_abi() {{ return {ABI}; }}

extern "C" const char* attnopt_key() {{ return "{spec.key}"; }}

extern "C" int32_t attnopt_backward(const void* const* tensors, const int64_t* meta, int32_t threads) {{
  if (!tensors || !meta || threads < 1) return 2;
  Args a{{}};
  a.n_b = *meta++, a.n_q = *meta++, a.n_k = *meta++;
  if (a.n_b < 1 || a.n_q < 1 || a.n_k < 1 || a.n_k > INT32_MAX / 2 || a.n_q > INT32_MAX / 2) return 2;
  int64_t* const strides[5] = {{a.q_stride, a.k_stride, a.v_stride, a.out_stride, a.grad_stride}};
  for (int i = 0; i < 20; ++i) strides[i / 4][i % 4] = *meta++;
  a.q = static_cast<const Element*>(*tensors++);
  a.k = static_cast<const Element*>(*tensors++);
  a.v = static_cast<const Element*>(*tensors++);
{chr(10).join(reads)}
  a.out = static_cast<const Element*>(*tensors++);
  a.grad = static_cast<const Element*>(*tensors++);
  a.lse = static_cast<const float*>(*tensors++);
  a.dlse = static_cast<const float*>(*tensors++);
  Element** const results[3] = {{&a.dq, &a.dk, &a.dv}};
  for (int i = 0; i < 3; ++i) *results[i] = static_cast<Element*>(const_cast<void*>(*tensors++));
{chr(10).join(grads)}
  if (!a.q || !a.k || !a.v || !a.grad || !a.dq || !a.dk || !a.dv) return 2;
  return run(a, threads);
}}"""
