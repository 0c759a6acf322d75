"""T1: the tiled forward in Triton. One program makes one tile of queries of one head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp

from attnopt.codegen import triton_pages as pages
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_gather import gathers, list_body, tile_of_list
from attnopt.codegen.triton_parts import Parts, arguments, assigned, head_map, indent, parts, precision
from attnopt.errors import SpecError
from attnopt.spec import AttentionSpec

_ROWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel: `kind` is a pointer to the dtype it names, `size`, `stride` or `scalar`.

    `of` is the tensor that it points to or is a stride of, `last` whether it is a tensor's last stride. `rows` marks
    tensors whose last dimension is a head's width.
    """

    name: str
    kind: str
    of: str = ""
    last: bool = False
    rows: bool = False


def tensor_arguments(names: Sequence[tuple[str, str, int]]) -> tuple[list[Argument], list[Argument]]:
    """Pointers and strides of tensors given as name, dtype and rank."""
    pointers = [Argument(f"{name}_ptr", dtype, name) for name, dtype, _ in names]
    strides = [
        Argument(f"{name}_stride{dim}", "stride", name, dim == rank - 1, name in _ROWS)
        for name, _, rank in names
        for dim in range(rank)
    ]
    return pointers, strides


def forward_arguments(spec: AttentionSpec, layout: Layout, listed: bool = False, rows: bool = False) -> list[Argument]:
    """What the kernel is called with, in order; `rows`: with the lists of rows that are computed."""
    captures = [(c.name, about.dtype, len(c.shape)) for c, about in zip(spec.captures, layout.captures, strict=True)]
    captures += pages.TENSORS if layout.page else ()
    tensors = [*((name, layout.dtype, 4) for name in ("q", "k", "v", "out")), *captures]
    pointers, strides = tensor_arguments([*tensors, (VISITED, "int32", 4)] if listed else tensors)
    lse = [Argument("lse_ptr", "float32", "lse")] if "lse" in spec.returns else []
    sizes = [Argument(name, "size") for name in ("n_b", "n_q", *(("n_pages", "n_slots") if layout.page else ("n_k",)))]
    scalars = [Argument(f"{name}_value", "scalar", name) for name in spec.scalars]
    return [*pointers, *lse, *(ROWS if rows else ()), *sizes, *strides, *scalars]


# The rows that are computed, int32 `[B, H, n_q]`, and how many of each head, `[B, H]`.
ROWS = Argument("places_ptr", "int32", "places"), Argument("counts_ptr", "int32", "counts")


def listing(spec: AttentionSpec, layout: Layout) -> tuple[str, list[Argument]]:
    """The text of the kernel that lists the rows that are computed, and its arguments."""
    given = [a for a in forward_arguments(spec, layout, rows=True) if a.of not in ("q", "k", "v")]
    body = list_body(spec, layout, " & (dv[None, :] < D_V)" if padded(spec.heads.d_v) else "")
    about = "The rows of one head that are computed, and zeros for the others."
    return kernel_text("attention_rows", about, given, body), given


def forward(spec: AttentionSpec, layout: Layout, listed: bool = False, block_n: int = 16) -> tuple[str, list[Argument]]:
    """The text of the kernel and of the function that visits keys, and the kernel's arguments."""
    if listed and gathers(spec):
        raise SpecError("lists of keys are for tiles of consecutive queries")
    if layout.page and listed:
        raise SpecError("with pages, positions alone say which tiles of keys are visited")
    if reason := pages.no_forward(spec, layout):
        raise SpecError(reason)
    made = parts(spec, layout, listed)
    given = forward_arguments(spec, layout, listed, gathers(spec))
    setup = [*_program(made), *pages.entry(layout.page), *load_queries(spec), *key_bases(spec, page=layout.page)]
    setup += _LIST if listed else [*made.ranges, *split_ranges(made)]
    setup += [*made.rows, *made.start, "acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)"]
    body = visit_body(made, listed, block_n)
    available = [*(a.name for a in given), *assigned(setup)]
    state = ["acc", *made.state]
    wanted = [x for x in arguments(body, available, state) if x not in ("k0", "lo", "hi")]
    visits = visit_calls(_LISTED if listed else loops(made), state, wanted)
    main = [*setup, *visits, *made.finish, *pages.nothing(spec, layout.page), *store(spec, gathers(spec))]
    kernel = kernel_text("attention_forward", _ABOUT, given, main)
    return f"{visit_function(state, wanted, body)}\n\n\n{kernel}", given


# The list of tiles: how many are kept whole, how many there are, and which, those first.
VISITED = "visited"
_LIST = [
    "list_base = visited_ptr + tl.cast(b, tl.int64) * visited_stride0 + tl.cast(h, tl.int64) * visited_stride1",
    "list_at = list_base + tl.cast(tile, tl.int64) * visited_stride2",
    "whole = 2 + tl.load(list_at)",
    "last = 2 + tl.load(list_at + 1)",
]
_LISTED = [("2", "whole", False), ("whole", "last", True)]
_ABOUT = "One tile of queries of one head."


def kernel_text(name: str, about: str, given: Sequence[Argument], body: Sequence[str]) -> str:
    """A kernel. Sizes and scalars are not specialised for, so that a new length is no new kernel."""
    plain = [a.name for a in given if a.kind in ("size", "scalar")]
    return "\n".join(
        [
            f"@triton.jit(do_not_specialize=[{', '.join(repr(x) for x in plain)}])",
            f"def {name}(",
            *indent(_grouped(given)),
            "):",
            f'    """{about}"""',
            *indent(body),
        ]
    )


def _grouped(given: Sequence[Argument]) -> list[str]:
    """Arguments by lines: pointers, sizes, the strides of each tensor, scalars."""
    groups: dict[str, list[str]] = {}
    for argument in given:
        plain = argument.kind + argument.of if argument.kind == "size" else argument.kind
        group = argument.of if argument.kind == "stride" else plain if argument.kind in ("size", "scalar") else "*"
        groups.setdefault(group, []).append(argument.name)
    return [f"{', '.join(names)}," for names in groups.values()]


def wrapped(names: Sequence[str], width: int = 100) -> list[str]:
    """Names by lines, each one with its comma."""
    lines = [""]
    for name in names:
        if lines[-1] and len(lines[-1]) + len(name) + 2 > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{name},"
    return lines if names else []


def visit_function(state: Sequence[str], wanted: Sequence[str], body: Sequence[str]) -> str:
    """The loop over keys as a function."""
    return "\n".join(
        [
            "@triton.jit",
            "def visit_keys(",
            *indent([f"{', '.join(state)},", *wrapped(wanted[len(state) :]), "lo, hi, MASKED: tl.constexpr,"]),
            "):",
            '    """Keys [lo, hi) by tiles. Not MASKED: every query of the tile keeps every one of them."""',
            *indent(body),
            f"    return {', '.join(state)}",
        ]
    )


def visit_body(made: Parts, listed: bool = False, block_n: int = 16) -> list[str]:
    """The loop over tiles of keys: over their first keys, or over places in the list."""
    keys, values = tile_loads(made.spec, made.layout.page, block_n)
    product = f"s = tl.dot(queries, keys{precision(made.layout)})"
    inside = [*keys, product, *values, *made.tile]
    if listed:
        return ["for place in range(lo, hi):", *indent(["k0 = tl.load(list_at + place) * BLOCK_N", *inside])]
    return ["for k0 in range(lo, hi, BLOCK_N):", *indent(inside)]


def tile_loads(spec: AttentionSpec, page: int = 0, block_n: int = 16) -> tuple[list[str], list[str]]:
    """Statements that load `keys [BLOCK_D, BLOCK_N]` and `values [BLOCK_N, BLOCK_DV]` of the tile at `k0`."""
    k_valid = "valid"
    k_at, v_at = (
        pages.address(x, page, block_n) if page else f"{x}_base + tl.cast(k0, tl.int64) * {x}_stride2 + {x}_offsets"
        for x in "kv"
    )
    keys = ["k = k0 + tl.arange(0, BLOCK_N)[None, :]", "valid = k < n_k if MASKED else None"]
    if padded(spec.heads.d_qk):
        k_valid = "key_valid"
        keys += ["in_width = d[:, None] < D_QK", "key_valid = in_width & valid if MASKED else in_width"]
    keys += pages.place(page, block_n) if page else []
    keys.append(f"keys = load_keys({k_at}, {k_valid})")
    inside = "k0 + tl.arange(0, BLOCK_N)[:, None] < n_k"
    if padded(spec.heads.d_v):
        values = ["in_values = dv[None, :] < D_V", f"value_valid = in_values & ({inside}) if MASKED else in_values"]
    else:
        values = [f"value_valid = {inside} if MASKED else None"]
    values.append(f"values = load_keys({v_at}, value_valid)")
    return keys, values


def padded(width: int) -> bool:
    """Whether a width is less than that of its tile: a power of two from 16 on."""
    return width != block_width(width)


def block_width(width: int) -> int:
    """The width of the tile that holds rows of this width."""
    return max(16, 1 << (width - 1).bit_length())


def _program(made: Parts) -> list[str]:
    heavy_first = made.split.static != sp.true
    rows = [
        "q0 = tile * BLOCK_M",
        "q1 = tl.minimum(q0 + BLOCK_M, n_q)",
        "q = tl.minimum(q0 + tl.arange(0, BLOCK_M)[:, None], n_q - 1)  # rows past the end repeat the last one",
    ]
    return [
        "tiles = tl.cdiv(n_q, BLOCK_M)",
        "tile = tl.program_id(0) % tiles",
        *(["tile = tiles - 1 - tile  # the last tiles of a head may have the most keys"] if heavy_first else []),
        "h = tl.program_id(0) // tiles % HEADS",
        "b = tl.program_id(0) // tiles // HEADS",
        *(tile_of_list() if gathers(made.spec) else rows),
        "d = tl.arange(0, BLOCK_D)",
        "dv = tl.arange(0, BLOCK_DV)",
    ]


def load_queries(spec: AttentionSpec) -> list[str]:
    """`queries [BLOCK_M, BLOCK_D]`."""
    mask = ", mask=d[None, :] < D_QK, other=0.0" if padded(spec.heads.d_qk) else ""
    return [
        "q_base = q_ptr + tl.cast(b, tl.int64) * q_stride0 + tl.cast(h, tl.int64) * q_stride1",
        f"queries = tl.load(q_base + tl.cast(q, tl.int64) * q_stride2 + d[None, :] * q_stride3{mask})",
    ]


def key_bases(spec: AttentionSpec, head: str = "h", page: int = 0) -> list[str]:
    """Where the keys and values of the head begin, and the offsets within a tile of them."""
    heads = spec.heads
    same = heads.k == heads.v and heads.k_map == heads.v_map
    entry = "" if page else "tl.cast(b, tl.int64) * {0}_stride0 + "
    return [
        f"key_head = {head_map(heads.k_map, heads.k, head)}",
        f"value_head = {'key_head' if same else head_map(heads.v_map, heads.v, head)}",
        f"k_base = k_ptr + {entry.format('k')}tl.cast(key_head, tl.int64) * k_stride1",
        f"v_base = v_ptr + {entry.format('v')}tl.cast(value_head, tl.int64) * v_stride1",
        "k_offsets = d[:, None] * k_stride3 + tl.arange(0, BLOCK_N)[None, :] * k_stride2",
        "v_offsets = tl.arange(0, BLOCK_N)[:, None] * v_stride2 + dv[None, :] * v_stride3",
    ]


def split_ranges(made: Parts) -> list[str]:
    """From key ranges to tiles: `first, full_first, full_last, last`."""
    lo, hi, full_lo, full_hi = made.ends
    lines = [
        "# Keys that some query of the tile may keep, and those that every one keeps as far as positions decide.",
        f"first = {'0' if lo == '0' else f'({lo}) // BLOCK_N * BLOCK_N'}",
        f"last = tl.maximum({hi}, first)",
    ]
    if full_hi == "0":
        return lines
    if full_lo == "0":
        lines.append("full_first = first")
    else:
        lines.append(f"full_first = tl.minimum(tl.cdiv(tl.maximum({full_lo}, first), BLOCK_N) * BLOCK_N, last)")
    lines.append(f"full_last = tl.maximum(tl.minimum({full_hi}, last) // BLOCK_N * BLOCK_N, full_first)")
    return lines


def loops(made: Parts, first: str = "first", last: str = "last") -> list[tuple[str, str, bool]]:
    """Partial tiles, full ones, partial ones: those that can exist, as begin, end and whether there is a mask."""
    _, _, full_lo, full_hi = made.ends
    if full_hi == "0":
        return [(first, last, True)]
    found = [("full_first", "full_last", False), ("full_last", last, True)]
    return found if full_lo == "0" else [(first, "full_first", True), *found]


def visit_calls(found: Sequence[tuple[str, str, bool]], state: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """A call of `visit_keys` for every loop."""
    lines = []
    for begin, end, masked in found:
        given = [f"{', '.join(state)},", *wrapped(wanted[len(state) :]), f"{begin}, {end}, {masked},"]
        lines += [f"{', '.join(state)} = visit_keys(", *indent(given), ")"]
    return lines


def store(spec: AttentionSpec, listed: bool = False) -> list[str]:
    """Statements that write a tile's `result`, and `lse`; `listed`: its rows stand in a list."""
    inside = "inside & (dv[None, :] < D_V)" if padded(spec.heads.d_v) else "inside"
    lines = [
        f"inside = {'place' if listed else 'q0'} + tl.arange(0, BLOCK_M)[:, None] < {'listed' if listed else 'n_q'}",
        "out_base = out_ptr + tl.cast(b, tl.int64) * out_stride0 + tl.cast(h, tl.int64) * out_stride1",
        "out_at = out_base + tl.cast(q, tl.int64) * out_stride2 + dv[None, :] * out_stride3",
        f"tl.store(out_at, result, mask={inside})",
    ]
    if "lse" in spec.returns:
        lines.append("tl.store(lse_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q + q, lse, mask=inside)")
    return lines
