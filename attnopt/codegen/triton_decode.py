"""T2: split-KV decode in Triton. The query heads of a group are the rows of one tile, so that each key is read once.

Programs share the keys of a row by splits; a second kernel joins their results.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt import expr as ex
from attnopt.analysis import tiles
from attnopt.codegen import triton_pages as pages
from attnopt.codegen.base import Layout
from attnopt.codegen.triton_forward import (
    Argument,
    forward_arguments,
    kernel_text,
    key_bases,
    load_queries,
    padded,
    store,
    visits,
)
from attnopt.codegen.triton_gather import wanted_rows
from attnopt.codegen.triton_parts import Parts, empty_state, folded_scale, parts, row_ends
from attnopt.codegen.triton_rows import replaced, spent_apart
from attnopt.codegen.triton_text import words
from attnopt.codegen.triton_visits import loops, split_ranges
from attnopt.spec import AttentionSpec, Pointwise

_PARTIAL = [Argument("sums_ptr", "float32", "sums"), Argument("state_ptr", "float32", "state")]
_SPLITS = Argument("n_splits", "size", "splits")


def group(spec: AttentionSpec) -> int:
    """How many query heads share one tile: those of a key head where it is `h // group`, else one."""
    heads, size = spec.heads, spec.heads.q // spec.heads.k
    regular = heads.k_map == heads.v_map == tuple(h // max(1, size) for h in range(heads.q))
    ends = tiles.key_ranges(tiles.analyse(spec.keep).bounds)
    return size if regular and not any(ex.depends(e, ex.h) for e in ends) else 1


def decode(spec: AttentionSpec, layout: Layout, block_n: int = 16) -> tuple[str, list[Argument], list[Argument]]:
    """The text of both kernels, and the arguments of each."""
    made = parts(spec, layout)
    given = _without(forward_arguments(spec, layout), ("out", "lse"))
    given = [*given[: _pointers(given)], *_PARTIAL, *given[_pointers(given) :], _SPLITS]
    setup = [*_program(spec), *pages.entry(layout), *load_queries(spec), *_bases(spec, layout)]
    setup += [*made.ranges, *split_ranges(made), *_share(made)]
    setup += [*made.rows, *(made.start if isinstance(spec.normalizer, Pointwise) else empty_state(spec))]
    setup.append("acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)")
    functions, calls = visits(made, given, setup, loops(made, "begin", "end"), block_n)
    split = kernel_text("attention_split", _SPLIT, given, [*setup, *calls, *_keep(made)])
    joined = _without(forward_arguments(spec, layout), ("q",))
    joined = [*joined[: _pointers(joined)], *_PARTIAL, *joined[_pointers(joined) :], _SPLITS]
    combine = kernel_text("attention_combine", _COMBINE, joined, _combine(spec, layout))
    return "\n\n\n".join([functions, split, combine]), given, joined


_SPLIT = "Some of the keys of one tile of rows: query heads of a group by query positions."
_COMBINE = "One tile of queries of one head, from what the splits found."


def _without(given: Sequence[Argument], tensors: Sequence[str]) -> list[Argument]:
    return [a for a in given if a.of not in tensors]


def _pointers(given: Sequence[Argument]) -> int:
    return next(i for i, a in enumerate(given) if a.kind == "size")


def _program(spec: AttentionSpec) -> list[str]:
    packed = group(spec)
    lines = [
        "split = tl.program_id(0) % n_splits",
        f"tiles = tl.cdiv({f'{packed} * n_q' if packed > 1 else 'n_q'}, BLOCK_M)",
        "tile = tl.program_id(0) // n_splits % tiles",
        "part = tl.program_id(0) // n_splits // tiles",
    ]
    if packed > 1:
        lines += [
            f"key_head = part % {spec.heads.k}",
            f"b = part // {spec.heads.k}",
            "row = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], " + f"{packed} * n_q - 1)",
            f"h = key_head * {packed} + row // n_q",
            "q = row % n_q",
            "q0 = 0  # a tile may hold any position",
            "q1 = n_q",
        ]
    else:
        lines += [
            "h = part % HEADS",
            "b = part // HEADS",
            "q0 = tile * BLOCK_M",
            "q1 = tl.minimum(q0 + BLOCK_M, n_q)",
            "q = tl.minimum(q0 + tl.arange(0, BLOCK_M)[:, None], n_q - 1)  # rows past the end repeat the last one",
        ]
    return [*lines, "d = tl.arange(0, BLOCK_D)", "dv = tl.arange(0, BLOCK_DV)"]


def _bases(spec: AttentionSpec, layout: Layout) -> list[str]:
    lines = key_bases(spec, layout=layout)
    return lines[1:] if group(spec) > 1 else lines  # the head is known there


def _share(made: Parts) -> list[str]:
    """The split's own part of every range."""
    lines = [
        "span = tl.cdiv(tl.cdiv(last - first, BLOCK_N), n_splits) * BLOCK_N",
        "begin = tl.minimum(first + split * span, last)",
        "end = tl.minimum(begin + span, last)",
    ]
    if made.ends[3] != "0":
        lines += [
            "full_first = tl.minimum(tl.maximum(full_first, begin), end)",
            "full_last = tl.maximum(tl.minimum(full_last, end), full_first)",
        ]
    return lines


def _keep(made: Parts) -> list[str]:
    """Store what was found: sums of values, and the state of each row."""
    count = len(made.state)
    inside = "rows_inside & (dv[None, :] < D_V)" if padded(made.spec.heads.d_v) else "rows_inside"
    bound = f"{group(made.spec)} * n_q" if group(made.spec) > 1 else "n_q"
    return [
        f"rows_inside = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None] < {bound}",
        "place = ((tl.cast(b, tl.int64) * HEADS + h) * n_q + q) * n_splits + split",
        f"tl.store(sums_ptr + place * D_V + dv[None, :], acc, mask={inside})",
        *(f"tl.store(state_ptr + place * {count} + {i}, {x}, mask=rows_inside)" for i, x in enumerate(made.state)),
    ]


def _combine(spec: AttentionSpec, layout: Layout) -> list[str]:
    ends = row_ends(spec, layout)
    count = len(ends.state)
    mask = ", mask=dv[None, :] < D_V, other=0.0" if padded(spec.heads.d_v) else ""
    lines = [
        "tiles = tl.cdiv(n_q, BLOCK_M)",
        "h = tl.program_id(0) // tiles % HEADS",
        "b = tl.program_id(0) // tiles // HEADS",
        "q0 = tl.program_id(0) % tiles * BLOCK_M",
        "q = tl.minimum(q0 + tl.arange(0, BLOCK_M)[:, None], n_q - 1)",
        "dv = tl.arange(0, BLOCK_DV)",
        *pages.entry(layout),
        *(["d = tl.arange(0, BLOCK_D)", *key_bases(spec, layout=layout)] if "v_base" in words(ends.finish) else []),
        *ends.start,
        "acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)",
        "for split in range(n_splits):",
        "    place = ((tl.cast(b, tl.int64) * HEADS + h) * n_q + q) * n_splits + split",
        f"    part = tl.load(sums_ptr + place * D_V + dv[None, :]{mask})",
        *(f"    {name}_part = tl.load(state_ptr + place * {count} + {i})" for i, name in enumerate(ends.state)),
        *(f"    {line}" for line in _join(spec, ends)),
    ]
    skipped = wanted_rows(spec, layout, "wanted")
    if skipped:
        skipped.append("result = tl.where(wanted, result, 0.0)")
        skipped += replaced(spec)
    return [*lines, *ends.finish, *pages.nothing(spec, layout), *skipped, *store(spec)]


def _join(spec: AttentionSpec, ends: Parts) -> list[str]:
    if isinstance(spec.normalizer, Pointwise):
        return ["acc += part", *(f"{name} += {name}_part" for name in ends.state)]
    factor = "" if folded_scale(spec) is not None else " * LOG2E"
    difference = "({0} - shift)" if factor else "{0} - shift"
    return [
        "m_next = tl.maximum(m, m_part)",
        'shift = tl.where(m_next == float("-inf"), 0.0, m_next)',
        f"decay = tl.exp2({difference.format('m')}{factor})",
        f"weight = tl.exp2({difference.format('m_part')}{factor})",
        *spent_apart(spec),
        "l = l * decay + l_part * weight",
        "acc = acc * decay + part * weight",
        "m = m_next",
    ]
