"""Chunked linear attention as a generated Triton file: `linear` and `linear_backward`, which run alone."""

from __future__ import annotations

import re

from attnopt import expr as ex
from attnopt.analysis.linear_form import LinearForm, linear_form
from attnopt.codegen.base import Layout
from attnopt.codegen.printer import Value
from attnopt.codegen.triton import Entry, TritonKernel, header
from attnopt.codegen.triton_dialect import TRITON, TritonPrinter, helpers
from attnopt.codegen.triton_forward import Argument, block_width
from attnopt.codegen.triton_linear_gradient import GRADIENT
from attnopt.codegen.triton_linear_launch import LAUNCH
from attnopt.codegen.triton_linear_skeleton import LINEAR
from attnopt.codegen.triton_loads import TritonLoader
from attnopt.codegen.triton_parts import ELEMENTS
from attnopt.codegen.triton_plans import Chip, TritonPlan
from attnopt.codegen.triton_text import head_map
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, Pointwise

# The state stands in registers: features times values of one head.
_WIDEST = 128
_ENTRIES = ("linear_state", "linear_scan", "linear_forward", "linear_dq", "linear_later", "linear_dkv")
# Numbers of a state that one program scans.
_SCANNED = 1024
# The gradient of the rate goes by so many columns of values at most.
_NARROW = 16
# Bytes of an element and greatest width: chunk, warps, stages, the first choice first. What is wider than a row says
# would not stay in registers.
_Rows = dict[tuple[int, int], tuple[tuple[int, int, int], ...]]
_PLANS: _Rows = {
    (2, 64): ((64, 8, 2), (32, 4, 1)),
    (2, 128): ((32, 8, 1), (16, 8, 1)),
    (4, 64): ((32, 4, 1), (16, 4, 1)),
}
# The same for the chips where it differs.
_FEWER: _Rows = {(2, 64): ((32, 4, 1), (64, 8, 2)), (2, 128): ((16, 8, 1),), (4, 64): ((16, 4, 1),)}
_OTHERS: dict[str, _Rows] = {
    **{chip: _FEWER for chip in ("sm_80", "sm_86", "sm_89", "sm_120")},
    "gfx942": {(2, 64): ((64, 4, 2), (32, 4, 1)), (2, 128): ((16, 8, 1), (32, 8, 1))},
}
# What a divisor may be made of, and what its text says for it.
_NAMED = {ex.b: "b", ex.h: "h", ex.q: "q", ex.n_q: "n_q", ex.n_k: "n_k", ex.n_h: "HEADS"}
# Tensors in the layout's dtype, and those whose last dimension is a head's width, without gaps between elements.
_ELEMENTS = ("q", "k", "v", "grad", "out")
_ROWS = (*_ELEMENTS, "dq", "dk", "dv")


def supported_linear(spec: AttentionSpec, layout: Layout, form: LinearForm | None = None) -> str | None:
    """Why there is no Triton kernel for this linear attention; None if there is one."""
    spec = spec.canonical()
    form, heads = form or linear_form(spec), spec.heads
    if form is None:
        return "the attention has no linear form"
    if layout.page:
        return "only the forward and decode kernels read keys in pages"
    if layout.dtype not in ELEMENTS:
        return f"the Triton kernel has no {layout.dtype}; it has {', '.join(ELEMENTS)}"
    if max(heads.d_qk, heads.d_v) > _WIDEST:
        return f"the Triton kernel holds states of up to {_WIDEST} x {_WIDEST}; this one is {heads.d_qk} x {heads.d_v}"
    assert isinstance(spec.normalizer, Pointwise)
    divide = spec.normalizer.divide
    if divide.has(ex.a, ex.Load) or divide.free_symbols - {*_NAMED, ex.t}:
        return "the Triton kernel divides a row by an expression in the sum of its weights, its place and sizes"
    try:
        _divisor(spec, layout)
    except SpecError as error:
        return str(error).rstrip(".")
    return None


def scales_queries(form: LinearForm) -> bool:
    """Whether the kernels take factors by query: the spec's own, or what a shift of a decay in places comes to."""
    return form.query != 1 or (form.rate != 0 and form.offset not in (None, 0))


def linear_plans(chip: Chip, dtype: str, d_qk: int, d_v: int) -> tuple[TritonPlan, ...]:
    """Schedules to choose from, the default first; none where the state is too wide."""
    size = 4 if dtype == "float32" else 2
    width = next((w for w in (64, 128) if max(d_qk, d_v) <= w), 0)
    rows = {**_PLANS, **_OTHERS.get(chip.name, {})}.get((size, width), ())
    return tuple(TritonPlan(chunk, chunk, warps, stages, chip.fp32) for chunk, warps, stages in rows)


def emit_linear(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """The kernels of a spec with a linear form. Raises `SpecError` where `supported_linear` gives a reason."""
    spec = spec.canonical()
    form, heads = linear_form(spec), spec.heads
    reason = supported_linear(spec, layout, form)
    if reason is not None or form is None:
        raise SpecError(f"{reason}.")
    layout = Layout(layout.dtype)  # captures are evaluated before, whatever theirs is
    divisor = _divisor(spec, layout)
    sections = [
        header(spec, layout, plan, source_note, "linear, forward and backward"),
        _constants(spec, form, layout, plan),
        *helpers(divisor),
        divisor,
        _head("key", heads.k_map, heads.k),
        _head("value", heads.v_map, heads.v),
        LINEAR,
        GRADIENT,
        LAUNCH,
    ]
    names = (*_ENTRIES, "linear_drate") if form.rate != 0 else _ENTRIES
    entries = (*(_entry(name, layout) for name in names), _entry("linear_forward", layout, exact=True))
    return TritonKernel(
        "\n\n\n".join(s.strip("\n") for s in sections) + "\n", spec.key, layout, plan, entries, "linear"
    )


def _head(name: str, table: tuple[int, ...], count: int) -> str:
    """The function from a query head to its head of keys or values."""
    lines = ["@triton.jit", f"def {name}_head(h):", f'    """The {name} head of a query head."""']
    return "\n".join([*lines, f"    return {head_map(table, count)}"])


def _divisor(spec: AttentionSpec, layout: Layout) -> str:
    """The function that makes the divisors of a chunk of rows from the sums of their weights."""
    assert isinstance(spec.normalizer, Pointwise)
    scalars = {symbol: Value(name, "i") for symbol, name in _NAMED.items()} | {ex.t: Value("total", "f")}
    printer = TritonPrinter(TRITON, scalars, TritonLoader(spec, layout))
    value = printer.cast(printer.visit(spec.normalizer.divide), "f", False).code
    lines = [
        "@triton.jit",
        "def divisor(total, b, h, q, n_q, n_k):",
        '    """What the rows of a chunk are divided by."""',
        *(f"    {line}" for line in printer.row),
        f"    return tl.full([CHUNK], 0.0, tl.float32) + {value}",
    ]
    return "\n".join(lines)


def _constants(spec: AttentionSpec, form: LinearForm, layout: Layout, plan: TritonPlan) -> str:
    heads = spec.heads
    values = {
        "HEADS": heads.q,
        "D_QK": heads.d_qk,
        "D_V": heads.d_v,
        "BLOCK_D": block_width(heads.d_qk),
        "BLOCK_DV": block_width(heads.d_v),
        "CHUNK": plan.block_m,
        "SCANNED": _SCANNED,
        "STATE_PARTS": -(-heads.d_qk * (heads.d_v + 1) // _SCANNED),
        "NARROW": min(_NARROW, block_width(heads.d_v)),
        "VALUE_PARTS": block_width(heads.d_v) // min(_NARROW, block_width(heads.d_v)),
        "CAUSAL": form.causal,
        "DECAY": form.rate != 0,
        "LINE": form.line is not None,
        "BY_KEY": form.key != 1,
        "BY_QUERY": scales_queries(form),
        "GATED": spec.gate != 1,
        "LOG2E": 1.4426950408889634,
        "FP32": f"'{plan.fp32}'",
        "ELEMENT": ELEMENTS[layout.dtype],
    }
    lines = [f"{name} = tl.constexpr({value})" for name, value in values.items()]
    options = f"OPTIONS = dict(num_warps={plan.warps}, num_stages={plan.stages}, enable_fp_fusion=True)"
    return "\n".join([*lines, options])


def _entry(name: str, layout: Layout, exact: bool = False) -> Entry:
    """A kernel with its arguments as its text has them; `exact`: it writes its results in fp32."""
    found = re.search(rf"def {name}\(\n(.*?)\n\):", LINEAR + GRADIENT, re.DOTALL)
    assert found is not None
    made = []
    for word in re.findall(r"\w+", found.group(1)):
        of = word.removesuffix("_ptr").split("_stride")[0]
        if word.endswith("_ptr"):
            plain = of in _ELEMENTS and not (exact and of == "out")
            made.append(Argument(word, layout.dtype if plain else "float32", of))
        elif "_stride" in word:
            made.append(Argument(word, "stride", of, rows=of in _ROWS))
        else:
            made.append(Argument(word, "size"))
    return Entry("linear_sums" if exact else name, tuple(made))
