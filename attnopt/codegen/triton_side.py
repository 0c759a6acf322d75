"""Column mass and weights in Triton: weights again, from the maximum and the sum of each row.

    p = e^(logit - max - log_sum)

For weights a tile of queries visits its keys and stores p. For column mass a tile of keys visits the tiles of queries
that may keep any of it, in order: every sum is made by one program, so that it is the same every time. What rows
without keys have is the launcher's caller's to add to a column: one number for all keys of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.plain import weights_of
from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import Entry, TritonKernel
from attnopt.codegen.triton_backward import _program, _seen, _tile_of_queries, _wanted
from attnopt.codegen.triton_dialect import helpers
from attnopt.codegen.triton_forward import (
    Argument,
    forward_arguments,
    kernel_text,
    key_bases,
    load_queries,
    tile_loads,
)
from attnopt.codegen.triton_gather import wanted_rows
from attnopt.codegen.triton_launchers import launch_arguments
from attnopt.codegen.triton_parts import Parts, kept_lines, precision, score_parts
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_text import indent
from attnopt.codegen.triton_visits import loops, split_ranges, wrapped
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

_RESULTS = ("rows", "mass", "weights")
_ROW = "((tl.cast(b, tl.int64) * HEADS + h) * n_q + q)"
_FILL = {EmptyRow.ZERO: "0.0", EmptyRow.NAN: 'float("nan")', EmptyRow.UNIFORM: "1.0 / n_k"}
# Rows whose weights are one number: those without keys, and those that a NaN or an infinity has spoilt.
_BLANK = [
    "spoilt = (row_max != row_max) | (log_sum != log_sum)",
    'other = (row_max == float("-inf")) | spoilt',
    'blank = tl.where(spoilt, float("nan"), tl.where(other, {fill}, 0.0))',
]


def supported_side(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why there are no Triton kernels for column mass and weights; None if there are."""
    spec = weights_of(spec)
    reason = triton.supported(spec, layout)
    if reason is not None or layout.page:
        return reason or "the Triton kernel has no weights of keys in pages"
    if isinstance(spec.normalizer, Pointwise) and ex.depends(spec.normalizer.divide, ex.t, ex.a):
        return "the Triton kernel has no weights whose divisor is made from them"
    taken = sorted({*_RESULTS} & {*(c.name for c in spec.captures), *spec.scalars})
    return f"the Triton kernel cannot use {taken[0]!r} as the name of a capture or scalar" if taken else None


def emit_side(spec: AttentionSpec, layout: Layout, plan: TritonPlan, source_note: str = "") -> TritonKernel:
    """Both kernels of a spec's weights, and `attention_side`, which launches one of them. As `triton.emit`."""
    reason = supported_side(spec, layout)
    if reason is not None:
        raise SpecError(f"{reason.rstrip('.')}.")
    spec = weights_of(spec)
    columns, mass = _columns(spec, layout)
    rows, weights = _weights(spec, layout)
    body = f"{columns}\n\n\n{rows}"
    sections = [
        triton.header(spec, layout, plan, source_note, "side outputs"),
        triton.constants(spec, plan, body),
        *helpers(body),
        body,
        _launcher(spec, mass, weights),
    ]
    entries = (Entry("attention_columns", tuple(mass)), Entry("attention_weights", tuple(weights)))
    text = "\n\n\n".join(s.strip("\n") for s in sections) + "\n"
    return TritonKernel(text, spec.key, layout, plan, entries, "side")


def _given(spec: AttentionSpec, layout: Layout, result: Argument) -> list[Argument]:
    base = [a for a in forward_arguments(replace(spec, rows=sp.true), layout) if a.of not in ("v", "out", "lse")]
    pointers = [a for a in base if a.kind not in ("size", "stride", "scalar")]
    return [*pointers, Argument("rows_ptr", "float32", "rows"), result, *(a for a in base if a not in pointers)]


def _key_lines(spec: AttentionSpec) -> list[str]:
    return [line for line in key_bases(spec) if line.startswith(("key_head", "k_base", "k_offsets"))]


def _known(spec: AttentionSpec, layout: Layout) -> list[str]:
    """What is known of a tile of queries: `queries`, `rows_inside`, and of a softmax `row_max` and `log_sum`."""
    lines = [*load_queries(spec), "rows_inside = q0 + tl.arange(0, BLOCK_M)[:, None] < n_q"]
    if isinstance(spec.normalizer, Softmax):
        lines += [f"row = {_ROW} * 2", "row_max = tl.load(rows_ptr + row)", "log_sum = tl.load(rows_ptr + row + 1)"]
    return [*lines, *wanted_rows(spec, layout, "wanted")]


def _probabilities(made: Parts, wanted: bool) -> list[str]:
    """From `s` to `p`, zero where a key is not kept."""
    inside = "rows_inside & wanted" if wanted else "rows_inside"
    if isinstance(made.spec.normalizer, Softmax):
        weight = "tl.exp2((logit - row_max) * LOG2E - log_sum * LOG2E)"
        some = f'{inside} & (row_max != float("-inf"))'
        return [*made.tile, f"p = tl.where({some}, {weight}, 0.0)"]
    assert isinstance(made.spec.normalizer, Pointwise)
    printer = made.printer.scope()
    divide = printer.cast(printer.visit(made.spec.normalizer.divide), "f", False).code
    over = "" if made.spec.normalizer.divide == 1 else f" / {divide}"
    kept = [*made.tile, *kept_lines(made), *printer.body]
    return [*kept, f"p = tl.where({inside} & (kept != 0.0), logit, 0.0){over}"]


def _columns(spec: AttentionSpec, layout: Layout) -> tuple[str, list[Argument]]:
    """The mass of one tile of keys of one head."""
    # Rows without keys are not visited for their fill.
    made = score_parts(replace(spec, empty_row=EmptyRow.ZERO), layout)
    given = _given(spec, layout, Argument("mass_ptr", "float32", "mass"))
    wanted = wanted_rows(spec, layout, "wanted")
    tile = _probabilities(made, bool(wanted))
    body = ["q0 = tile * BLOCK_M", *_tile_of_queries(), *_known(spec, layout), *made.printer.row]
    body += [f"s = tl.dot(queries, keys{precision(layout)})", *tile, "mass += tl.sum(p, 0, keep_dims=True)"]
    loop = ["for tile in range(lo, hi):", *indent(body)]
    setup = [
        "key_tiles = tl.cdiv(n_k, BLOCK_N)",
        "k0 = tl.program_id(0) % key_tiles * BLOCK_N",
        "h = tl.program_id(0) // key_tiles % HEADS",
        "b = tl.program_id(0) // key_tiles // HEADS",
        "d = tl.arange(0, BLOCK_D)",
        *_key_lines(spec),
        *(line.split(" if MASKED")[0] for line in tile_loads(spec)[0]),
        "tiles = tl.cdiv(n_q, BLOCK_M)",
        "mass = tl.zeros([1, BLOCK_N], tl.float32)",
    ]
    names = _wanted(loop, given, setup, ["mass"])
    main = [
        *setup,
        *_seen(made),
        "mass = visit_queries(",
        *indent(["mass,", *wrapped(names[1:]), "begin, end, True,"]),
        ")",
        "mass_at = mass_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_k + k",
        "tl.store(mass_at, mass, mask=valid)",
    ]
    about = "Tiles [lo, hi) of queries: their part of the mass."
    function = _function("visit_queries", about, ["mass,", *wrapped(names[1:])], loop, "mass")
    return f"{function}\n\n\n{kernel_text('attention_columns', 'The mass of one tile of keys.', given, main)}", given


def _weights(spec: AttentionSpec, layout: Layout) -> tuple[str, list[Argument]]:
    """The weights of one tile of queries of one head."""
    made = score_parts(spec, layout)
    given = _given(spec, layout, Argument("weights_ptr", layout.dtype, "weights"))
    wanted = wanted_rows(spec, layout, "wanted")
    softmax = isinstance(spec.normalizer, Softmax)
    tile = _probabilities(made, bool(wanted))
    filled = ["p = tl.where(other, blank, p)"] if softmax else []
    write = "tl.store(weights_at + k, p, mask=rows_inside & (k < n_k))"
    body = [*tile_loads(spec)[0], f"s = tl.dot(queries, keys{precision(layout)})", *tile, *filled, write]
    loop = ["for k0 in range(lo, hi, BLOCK_N):", *indent(body)]
    setup = [*_program(), "d = tl.arange(0, BLOCK_D)", *_known(spec, layout), *_key_lines(spec)]
    setup += [*made.ranges, *split_ranges(made), *made.printer.row[len(made.ranges) :]]
    setup.append(f"weights_at = weights_ptr + {_ROW} * n_k")
    if softmax:
        setup += [x.format(fill=_FILL[spec.empty_row]) for x in _BLANK]
    names = _wanted(loop, given, setup, [])
    calls = []
    for begin, end, masked in loops(made):
        calls += ["visit_keys(", *indent([*wrapped(names), f"{begin}, {end}, {masked},"]), ")"]
    rest = [
        "for k0 in range(0, n_k, BLOCK_N):  # keys that no query of the tile keeps",
        "    if (k0 < first) | (k0 >= last):",
        "        k = k0 + tl.arange(0, BLOCK_N)[None, :]",
        f"        p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32){' + blank' if softmax else ''}",
        f"        {write}",
    ]
    lo, hi, _, _ = made.ends
    main = [*setup, *calls, *([] if (lo, hi) == ("0", "n_k") else rest)]
    function = _function("visit_keys", "Keys [lo, hi) by tiles: their weights.", wrapped(names), loop)
    about = "The weights of one tile of queries."
    return f"{function}\n\n\n{kernel_text('attention_weights', about, given, main)}", given


def _function(name: str, about: str, given: Sequence[str], body: Sequence[str], result: str = "") -> str:
    lines = ["@triton.jit", f"def {name}(", *indent([*given, "lo, hi, MASKED: tl.constexpr,"]), "):"]
    lines += [f'    """{about}"""', *indent(body)]
    return "\n".join([*lines, *([f"    return {result}"] if result else [])])


def _launcher(spec: AttentionSpec, mass: Sequence[Argument], weights: Sequence[Argument]) -> str:
    """The function that launches one of the kernels."""
    captures, heads = [c.name for c in spec.captures], spec.heads.q
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    lines = [
        "batch, heads, n_q, _ = q.shape",
        'if name == "weights":',
        "    weights = q.new_empty((batch, heads, n_q, k.shape[2]))",
        f"    attention_weights[(triton.cdiv(n_q, BLOCK_M.value) * batch * {heads}, 1, 1)](",
        *(f"        {line}" for line in launch_arguments(weights, captures)),
        "        **OPTIONS,",
        "    )",
        "    return weights",
        "mass = q.new_empty((batch, heads, k.shape[2]), dtype=torch.float32)",
        f"attention_columns[(triton.cdiv(k.shape[2], BLOCK_N.value) * batch * {heads}, 1, 1)](",
        *(f"    {line}" for line in launch_arguments(mass, captures)),
        "    **OPTIONS,",
        ")",
        "return mass",
    ]
    return "\n".join(
        [
            f"def attention_side({', '.join(['q', 'k', *names])}, rows, name):",
            f'    """`weights` [B, {heads}, n_q, n_k] in the dtype of q, or `column_mass` [B, {heads}, n_k] in fp32,',
            "    to which rows without keys have not been added.",
            "",
            f"    `rows` [B, {heads}, n_q, 2]: the maximum of each row and the logarithm of its sum from there, fp32.",
            '    """',
            *(f"    {line}" for line in lines),
        ]
    )
