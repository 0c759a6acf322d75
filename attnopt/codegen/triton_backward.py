"""T3: gradients of an attention in Triton, from its result and lse.

Tiles of queries visit keys for dQ and for the gradients of loaded tables; tiles of keys visit queries for dK and dV.
Tables are added to by atomics, so that their last bits may differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.derivative import derivative
from attnopt.codegen.printer import Printer
from attnopt.codegen.triton_forward import (
    Argument,
    forward_arguments,
    kernel_text,
    key_bases,
    load_queries,
    padded,
    tensor_arguments,
    tile_loads,
)
from attnopt.codegen.triton_gather import gathers, wanted_rows
from attnopt.codegen.triton_parts import ELEMENTS, Parts, kept_lines, precision, printer_of, score_parts
from attnopt.codegen.triton_readers import by_runs
from attnopt.codegen.triton_tables import SOME_KEY, sink_gradient, table_gradients
from attnopt.codegen.triton_text import arguments, assigned, indent
from attnopt.codegen.triton_visits import loops, split_ranges, visit_calls, wrapped
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

_INSIDE = "rows_inside = q0 + tl.arange(0, BLOCK_M)[:, None] < n_q"
_ROW = "(tl.cast(b, tl.int64) * HEADS + h) * n_q + q"


def undifferentiable(spec: AttentionSpec, learned: Sequence[str]) -> str | None:
    """Why there is no Triton kernel for the gradients; None if there is one. Raises `SpecError` as `backward` does."""
    if isinstance(spec.normalizer, Pointwise) and ex.depends(spec.normalizer.divide, ex.t, ex.a):
        return "the Triton kernel has no gradient of a divisor that is made from the weights"
    others = {name: e for name, e in spec.expressions.items() if name not in ("score", "keep")}
    for load in ex.loads(*others.values()):
        if load.args[0].name in learned and load != others.get("sink"):
            return f"the Triton kernel has no gradient of {load.args[0].name}"
    return None


def backward(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> list[tuple[str, str, list[Argument]]]:
    """Name, text and arguments of each kernel, in the order they run. `learned`: captures that have a gradient."""
    return [
        ("attention_delta", *_delta(spec, layout, learned)),
        ("attention_dkv", *_keys(spec, layout)),
        ("attention_dq", *_queries(spec, layout, learned)),
    ]


def _given(spec: AttentionSpec, layout: Layout, results: Sequence[tuple[str, str, int]]) -> list[Argument]:
    """The forward kernel's inputs, what is known of its rows, and tensors for the results."""
    base = [a for a in forward_arguments(spec, layout) if a.of not in ("out", "lse")]
    pointers, strides = tensor_arguments([("grad", layout.dtype, 4), *results])
    rows = [Argument("lse_ptr", "float32", "lse"), Argument("delta_ptr", "float32", "delta")]
    kinds = {kind: [a for a in base if a.kind == kind] for kind in ("size", "stride", "scalar")}
    inputs = [a for a in base if a.kind not in kinds]
    return [*inputs, *rows, *pointers, *kinds["size"], *kinds["stride"], *strides, *kinds["scalar"]]


def _tile_of_queries() -> list[str]:
    return [
        "q1 = tl.minimum(q0 + BLOCK_M, n_q)",
        "q = tl.minimum(q0 + tl.arange(0, BLOCK_M)[:, None], n_q - 1)  # rows past the end repeat the last one",
    ]


def _program() -> list[str]:
    return [
        "tiles = tl.cdiv(n_q, BLOCK_M)",
        "h = tl.program_id(0) // tiles % HEADS",
        "b = tl.program_id(0) // tiles // HEADS",
        "q0 = tl.program_id(0) % tiles * BLOCK_M",
        *_tile_of_queries(),
    ]


def _rows(spec: AttentionSpec, name: str) -> list[str]:
    """A tile of a tensor that has a row of values for each query."""
    mask = ", mask=dv[None, :] < D_V, other=0.0" if padded(spec.heads.d_v) else ""
    return [
        f"{name}_base = {name}_ptr + tl.cast(b, tl.int64) * {name}_stride0 + tl.cast(h, tl.int64) * {name}_stride1",
        f"{name} = tl.load({name}_base + tl.cast(q, tl.int64) * {name}_stride2 + dv[None, :] * {name}_stride3{mask})",
    ]


def _known(spec: AttentionSpec, layout: Layout) -> list[str]:
    """What is known of a tile of queries: `queries, grad, row_lse, delta, rows_inside`."""
    return [
        *load_queries(spec),
        *_rows(spec, "grad"),
        f"row = {_ROW}",
        "row_lse = tl.load(lse_ptr + row)",
        "delta = tl.load(delta_ptr + row)",
        _INSIDE,
        *wanted_rows(spec, layout, "wanted"),
        *(["rows_inside = rows_inside & wanted"] if gathers(spec) else []),
    ]


def _delta(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> tuple[str, list[Argument]]:
    # The result as the forward stored it; where roundings would add up in a table, it is made again in fp32.
    pointers, strides = tensor_arguments(
        [("out", "float32" if learned else layout.dtype, 4), ("grad", layout.dtype, 4)]
    )
    rows = [Argument("dlse_ptr", "float32", "dlse"), Argument("delta_ptr", "float32", "delta")]
    given = [*pointers, *rows, Argument("n_q", "size"), *strides]
    lines = [
        *_program(),
        "dv = tl.arange(0, BLOCK_DV)",
        *_rows(spec, "out"),
        *_rows(spec, "grad"),
        f"row = {_ROW}",
        "delta = tl.sum(tl.cast(out, tl.float32) * tl.cast(grad, tl.float32), 1, keep_dims=True)",
        "delta -= tl.load(dlse_ptr + row)",
        "tl.store(delta_ptr + row, delta, mask=q0 + tl.arange(0, BLOCK_M)[:, None] < n_q)",
    ]
    return kernel_text(
        "attention_delta", "What the gradients of a row's weights are measured from.", given, lines
    ), given


def _weights(made: Parts) -> list[str]:
    """From `s` to `p`, the weights, `dlogit`, and `ds`, the gradient of the product of query and key."""
    spec, softmax = made.spec, isinstance(made.spec.normalizer, Softmax)
    printer = made.printer.scope()
    slope = printer.cast(printer.visit(derivative(spec.score, ex.s)), "f", True).code
    lines = [*made.tile, f"dp = tl.dot(grad, tl.trans(values){precision(made.layout)}){_row_factor(spec, printer)}"]
    if softmax:
        lines.append(f"p = tl.where(rows_inside & ({SOME_KEY}), tl.exp2((logit - row_lse) * LOG2E), 0.0)")
        lines.append("kept = p != 0.0")
    else:
        lines += [*kept_lines(made), "kept = rows_inside & (kept != 0.0)", "p = tl.where(kept, logit, 0.0)"]
    lines += printer.body
    more = ""
    if spec.weight != 1:
        factor = printer.scope()
        weight = factor.cast(factor.visit(spec.weight), "f", True).code
        change = factor.cast(factor.visit(derivative(spec.weight, ex.s)), "f", True).code
        more = "" if derivative(spec.weight, ex.s) == 0 else f" + p * dp * {change}"
        lines += [*factor.body, f"factor = {weight}"]
    dp = "dp" if spec.weight == 1 else "dp * factor"
    lines.append(f"dlogit = tl.where(kept, {f'p * ({dp} - delta)' if softmax else dp}, 0.0)")
    lines.append(f"ds = tl.where(kept, dlogit * {slope}{more}, 0.0)")
    return [*lines, *([] if spec.weight == 1 else ["p = tl.where(kept, p * factor, 0.0)"])]


def _row_factor(spec: AttentionSpec, printer: Printer) -> str:
    """What a row's result is multiplied by: its gate, and one over its divisor."""
    gate = "" if spec.gate == 1 else f" * {printer.cast(printer.visit(spec.gate), 'f', False).code}"
    if isinstance(spec.normalizer, Pointwise) and spec.normalizer.divide != 1:
        gate += f" / {printer.cast(printer.visit(spec.normalizer.divide), 'f', False).code}"
    return gate


def _cast(layout: Layout, code: str) -> str:
    return code if layout.dtype == "float32" else f"tl.cast({code}, {ELEMENTS[layout.dtype]})"


def _function(name: str, about: str, state: Sequence[str], wanted: Sequence[str], body: Sequence[str]) -> str:
    given = [f"{', '.join(state)},", *wrapped(wanted[len(state) :]), "lo, hi, MASKED: tl.constexpr,"]
    lines = ["@triton.jit", f"def {name}(", *indent(given), "):", f'    """{about}"""']
    return "\n".join([*lines, *indent(body), f"    return {', '.join(state)}"])


def _wanted(body: Sequence[str], given: Sequence[Argument], setup: Sequence[str], state: Sequence[str]) -> list[str]:
    available = [*(a.name for a in given), *assigned(setup)]
    return [x for x in arguments(body, available, state) if x not in ("k0", "lo", "hi")]


def _queries(spec: AttentionSpec, layout: Layout, learned: Sequence[str]) -> tuple[str, list[Argument]]:
    """dQ, and what is added to the gradients of loaded tables."""
    made = score_parts(spec, layout)
    tables = [(f"grad_{c.name}", "float32", len(c.shape)) for c in spec.captures if c.name in learned]
    given = _given(spec, layout, [("dq", layout.dtype, 4), *tables])
    keys, values = tile_loads(spec)
    body = [
        *keys,
        f"s = tl.dot(queries, keys{precision(layout)})",
        *values,
        *_weights(made),
        *table_gradients(made, learned),
    ]
    body.append(f"grad_q = tl.dot({_cast(layout, 'ds')}, tl.trans(keys), grad_q{precision(layout)})")
    loop = ["for k0 in range(lo, hi, BLOCK_N):", *indent(body)]
    setup = [
        *_program(),
        "d = tl.arange(0, BLOCK_D)",
        "dv = tl.arange(0, BLOCK_DV)",
        *_known(spec, layout),
        *key_bases(spec),
    ]
    setup += [*made.ranges, *split_ranges(made), *made.printer.row[len(made.ranges) :]]
    setup.append("grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)")
    wanted = _wanted(loop, given, setup, ["grad_q"])
    function = _function("visit_keys", "Keys [lo, hi) by tiles: their part of dQ.", ["grad_q"], wanted, loop)
    inside = "rows_inside & (d[None, :] < D_QK)" if padded(spec.heads.d_qk) else "rows_inside"
    main = [
        *setup,
        *visit_calls(loops(made), ["grad_q"], wanted),
        *sink_gradient(spec, layout, learned),
        *([_INSIDE] if gathers(spec) else []),
        "dq_base = dq_ptr + tl.cast(b, tl.int64) * dq_stride0 + tl.cast(h, tl.int64) * dq_stride1",
        f"tl.store(dq_base + tl.cast(q, tl.int64) * dq_stride2 + d[None, :] * dq_stride3, grad_q, mask={inside})",
    ]
    return f"{function}\n\n\n{kernel_text('attention_dq', 'dQ of one tile of queries.', given, main)}", given


def _keys(spec: AttentionSpec, layout: Layout) -> tuple[str, list[Argument]]:
    """DK and dV: a tile of keys, the query heads of its run or one, the tiles of queries that may keep any of them."""
    made, runs = score_parts(spec, layout), by_runs(spec.heads)
    dtype = layout.dtype if runs else "float32"
    given = _given(spec, layout, [("dk", dtype, 4), ("dv", dtype, 4)])
    state, group = ["grad_k", "grad_v"], spec.heads.q // spec.heads.k
    weights = _weights(made)
    body = ["q0 = tile * BLOCK_M", *_tile_of_queries(), *_known(spec, layout), *made.printer.row]
    body += [f"s = tl.dot(queries, keys{precision(layout)})", *weights, *_shares(spec, layout)]
    body += [
        f"grad_v = tl.dot(tl.trans({_cast(layout, 'p')}), grad, grad_v{precision(layout)})",
        f"grad_k = tl.dot(tl.trans({_cast(layout, 'ds')}), queries, grad_k{precision(layout)})",
    ]
    loop = ["for tile in range(lo, hi):", *indent(body)]
    loads = [line.split(" if MASKED")[0] for part in tile_loads(spec) for line in part]
    setup = [
        "key_tiles = tl.cdiv(n_k, BLOCK_N)",
        "k0 = tl.program_id(0) % key_tiles * BLOCK_N",
        f"{'key_head' if runs else 'h'} = tl.program_id(0) // key_tiles % {spec.heads.k if runs else 'HEADS'}",
        f"b = tl.program_id(0) // key_tiles // {spec.heads.k if runs else 'HEADS'}",
        "d = tl.arange(0, BLOCK_D)",
        "dv = tl.arange(0, BLOCK_DV)",
        *key_bases(spec)[runs:],
        *loads,
        "tiles = tl.cdiv(n_q, BLOCK_M)",
        "grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)",
        "grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)",
    ]
    inner = [*([f"h = key_head * {group} + member"] if runs else []), *_seen(made)]
    wanted = _wanted(loop, given, [*setup, *inner[:runs]], state)
    call = [f"{', '.join(state)},", *wrapped(wanted[2:]), "begin, end, True,"]
    inner += [f"{', '.join(state)} = visit_queries(", *indent(call), ")"]
    inner = [f"for member in range({group}):", *indent(inner)] if runs else inner
    main = [*setup, *inner, *_store_keys(spec, runs)]
    about = "Tiles [lo, hi) of queries: their part of dK and dV."
    function = _function("visit_queries", about, state, wanted, loop)
    return f"{function}\n\n\n{kernel_text('attention_dkv', 'dK and dV of one tile of keys.', given, main)}", given


def _shares(spec: AttentionSpec, layout: Layout) -> list[str]:
    """What a value's gradient has of each row beside its weight: the gate, and rows without any key."""
    printer = printer_of(spec, layout)
    gate = _row_factor(spec, printer)
    lines = [*printer.row, f"p = p{gate}"] if gate else []
    if spec.empty_row is EmptyRow.UNIFORM and isinstance(spec.normalizer, Softmax):
        nothing = 'rows_inside & (row_lse == float("-inf")) & (k < n_k)'
        lines.append(f"p = tl.where({nothing}, 1.0 / n_k{gate}, p)")
    return lines


def _seen(made: Parts) -> list[str]:
    """The tiles of queries `[begin, end)` that may keep a key of the tile."""
    lo, hi, _, _ = made.ends
    if (lo == "0" and hi == "n_k") or made.spec.empty_row is EmptyRow.UNIFORM:
        return ["begin = 0", "end = tiles"]
    scan = ["q0 = tile * BLOCK_M", "q1 = tl.minimum(q0 + BLOCK_M, n_q)", *made.ranges]
    scan += [
        f"seen = ({lo} < k0 + BLOCK_N) & ({hi} > k0)",
        "begin = tl.where(seen & (tile < begin), tile, begin)",
        "end = tl.where(seen, tile + 1, end)",
    ]
    return ["begin = tiles", "end = tiles * 0", "for tile in range(0, tiles):", *indent(scan)]


def _store_keys(spec: AttentionSpec, runs: bool) -> list[str]:
    lines = ["keys_inside = k0 + tl.arange(0, BLOCK_N)[:, None] < n_k"]
    for name, width, offset, bound in (("k", spec.heads.d_qk, "d", "D_QK"), ("v", spec.heads.d_v, "dv", "D_V")):
        inside = f"keys_inside & ({offset}[None, :] < {bound})" if padded(width) else "keys_inside"
        head = f"tl.cast({('key_head' if name == 'k' else 'value_head') if runs else 'h'}, tl.int64)"
        lines += [
            f"d{name}_base = d{name}_ptr + tl.cast(b, tl.int64) * d{name}_stride0 + {head} * d{name}_stride1",
            f"d{name}_at = d{name}_base + tl.cast(k0 + tl.arange(0, BLOCK_N)[:, None], tl.int64) * d{name}_stride2",
            f"tl.store(d{name}_at + {offset}[None, :] * d{name}_stride3, grad_{name}, mask={inside})",
        ]
    return lines
