"""T1: the tiled forward in Triton. One program makes one tile of queries of one head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp

from attnopt.codegen import triton_pages as pages
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_gather import gathers, list_body, tile_of_list
from attnopt.codegen.triton_parts import Parts, parts, precision
from attnopt.codegen.triton_rows import stored
from attnopt.codegen.triton_text import arguments, assigned, head_map, indent
from attnopt.codegen.triton_visits import Loop, loops, split_ranges, visit_calls, visit_function
from attnopt.errors import SpecError
from attnopt.returns import of_rows
from attnopt.spec import AttentionSpec

_ROWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv", *pages.NEW)


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
    captures += pages.tensors(layout)
    tensors = [*((name, layout.dtype, 4) for name in ("q", "k", "v", "out")), *captures]
    pointers, strides = tensor_arguments([*tensors, (VISITED, "int32", 4)] if listed else tensors)
    lse = [Argument("lse_ptr", "float32", "lse")] if of_rows(spec.returns) else []
    sizes = [Argument(name, "size") for name in ("n_b", "n_q", *pages.sizes(layout))]
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
    setup = [*_program(made), *pages.entry(layout), *load_queries(spec), *key_bases(spec, layout=layout)]
    setup += _LIST if listed else [*made.ranges, *split_ranges(made)]
    setup += [*made.rows, *made.start, "acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)"]
    functions, calls = visits(made, given, setup, _LISTED if listed else loops(made), block_n, listed)
    main = [*setup, *calls, *made.finish, *pages.nothing(spec, layout), *store(spec, gathers(spec))]
    kernel = kernel_text("attention_forward", _ABOUT, given, main)
    return f"{functions}\n\n\n{kernel}", given


def visits(
    made: Parts, given: Sequence[Argument], setup: list[str], found: Sequence[Loop], block_n: int, listed: bool = False
) -> tuple[str, list[str]]:
    """The functions that visit keys, and their calls for the loops found. Ends `setup` with the ends of segments."""
    setup += pages.segments(found[-1][1], made.ends[3] != "0") if made.layout.new else []
    available, state = [*(a.name for a in given), *assigned(setup)], ["acc", *made.state]
    functions, calls = [], []
    for name, own in (("visit_keys", found), *([("visit_new", pages.LATER)] if made.layout.new else [])):
        body = visit_body(made, listed, block_n, name == "visit_new")
        wanted = [x for x in arguments(body, available, state) if x not in ("k0", "lo", "hi")]
        functions.append(visit_function(name, state, wanted, body))
        calls += visit_calls(own, state, wanted, name)
    return "\n\n\n".join(functions), calls


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


def visit_body(made: Parts, listed: bool, block_n: int, new: bool) -> list[str]:
    """The loop over tiles of keys: over their first keys, or over places in the list. `new`: those behind pages."""
    keys, values = tile_loads(made.spec, made.layout, block_n, new)
    product = f"s = tl.dot(queries, keys{precision(made.layout)})"
    inside = [*keys, product, *values, *made.tile]
    if listed:
        return ["for place in range(lo, hi):", *indent(["k0 = tl.load(list_at + place) * BLOCK_N", *inside])]
    return ["for k0 in range(lo, hi, BLOCK_N):", *indent(inside)]


def tile_loads(
    spec: AttentionSpec, layout: Layout | None = None, block_n: int = 16, new: bool = False
) -> tuple[list[str], list[str]]:
    """Statements that load `keys [BLOCK_D, BLOCK_N]` and `values [BLOCK_N, BLOCK_DV]` of the tile at `k0`."""
    k_valid, bound = "valid", "hi" if layout is not None and layout.new else "n_k"
    paged = layout if layout is not None and layout.page else None
    k_at, v_at = (
        pages.address(x, paged, block_n, new)
        if paged
        else f"{x}_base + tl.cast(k0, tl.int64) * {x}_stride2 + {x}_offsets"
        for x in "kv"
    )
    keys = ["k = k0 + tl.arange(0, BLOCK_N)[None, :]", f"valid = k < {bound} if MASKED else None"]
    if padded(spec.heads.d_qk):
        k_valid = "key_valid"
        keys += ["in_width = d[:, None] < D_QK", "key_valid = in_width & valid if MASKED else in_width"]
    keys += pages.place(paged, block_n) if paged and not new else []
    keys.append(f"keys = load_keys({k_at}, {k_valid})")
    inside = f"k0 + tl.arange(0, BLOCK_N)[:, None] < {bound}"
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


def key_bases(spec: AttentionSpec, head: str = "h", layout: Layout | None = None) -> list[str]:
    """Where the keys and values of the head begin, and the offsets within a tile of them."""
    heads = spec.heads
    same = heads.k == heads.v and heads.k_map == heads.v_map
    paged = layout is not None and layout.page
    entry = "" if paged else "tl.cast(b, tl.int64) * {0}_stride0 + "
    return [
        f"key_head = {head_map(heads.k_map, heads.k, head)}",
        f"value_head = {'key_head' if same else head_map(heads.v_map, heads.v, head)}",
        f"k_base = k_ptr + {entry.format('k')}tl.cast(key_head, tl.int64) * k_stride1",
        f"v_base = v_ptr + {entry.format('v')}tl.cast(value_head, tl.int64) * v_stride1",
        *(pages.new_bases(layout) if layout is not None and paged else []),
        "k_offsets = d[:, None] * k_stride3 + tl.arange(0, BLOCK_N)[None, :] * k_stride2",
        "v_offsets = tl.arange(0, BLOCK_N)[:, None] * v_stride2 + dv[None, :] * v_stride3",
    ]


def store(spec: AttentionSpec, listed: bool = False) -> list[str]:
    """Statements that write a tile's `result` and side outputs; `listed`: its rows stand in a list."""
    inside = "inside & (dv[None, :] < D_V)" if padded(spec.heads.d_v) else "inside"
    lines = [
        f"inside = {'place' if listed else 'q0'} + tl.arange(0, BLOCK_M)[:, None] < {'listed' if listed else 'n_q'}",
        "out_base = out_ptr + tl.cast(b, tl.int64) * out_stride0 + tl.cast(h, tl.int64) * out_stride1",
        "out_at = out_base + tl.cast(q, tl.int64) * out_stride2 + dv[None, :] * out_stride3",
        f"tl.store(out_at, result, mask={inside})",
    ]
    return [*lines, *stored(spec, "(tl.cast(b, tl.int64) * HEADS + h) * n_q + q", "inside")]
