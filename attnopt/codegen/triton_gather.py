"""Triton kernels that compute some query rows of a head: one lists them, in order, the next cuts tiles from the list.

Tiles hold listed rows at their true positions; keys are visited as ever. Nothing waits for the host: programs whose
tile lies beyond the end of the list return at once.
"""

from __future__ import annotations

import sympy as sp

from attnopt.codegen.base import Layout
from attnopt.codegen.triton_parts import printer_of
from attnopt.codegen.triton_rows import left_out
from attnopt.spec import AttentionSpec


def gathers(spec: AttentionSpec) -> bool:
    """Whether only some rows of a head are computed."""
    return bool(spec.rows != sp.true)


def wanted_rows(spec: AttentionSpec, layout: Layout, name: str) -> list[str]:
    """Statements that make `name`: whether the rows `q` of head `h` are computed."""
    if not gathers(spec):
        return []
    printer = printer_of(spec, layout)
    code = printer.visit(spec.rows).code
    return [*printer.row, *printer.body, f"{name} = {code}"]


def list_body(spec: AttentionSpec, layout: Layout, inside_width: str) -> list[str]:
    """The kernel that lists the rows of one head and writes zeros for the others."""
    loop = [
        "q = start + tl.arange(0, BLOCK_M)[:, None]",
        "inside = q < n_q",
        "q = tl.minimum(q, n_q - 1)",
        *wanted_rows(spec, layout, "wanted"),
        "chosen = inside & wanted",
        "skipped = inside & (chosen == 0)",
        "ones = tl.cast(chosen, tl.int32)",
        "place = count + tl.cumsum(ones, 0) - 1",
        "tl.store(places_ptr + head * n_q + place, q, mask=chosen)",
        "count += tl.sum(ones)",
        "out_at = out_base + tl.cast(q, tl.int64) * out_stride2 + dv[None, :] * out_stride3",
        f"tl.store(out_at, zeros, mask=skipped{inside_width})",
        *left_out(spec, "head * n_q + q", "skipped"),
    ]
    return [
        "h = tl.program_id(0) % HEADS",
        "b = tl.program_id(0) // HEADS",
        "head = tl.cast(tl.program_id(0), tl.int64)",
        "dv = tl.arange(0, BLOCK_DV)",
        "zeros = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)",
        "out_base = out_ptr + tl.cast(b, tl.int64) * out_stride0 + tl.cast(h, tl.int64) * out_stride1",
        "count = 0",
        "for start in range(0, n_q, BLOCK_M):",
        *(f"    {line}" for line in loop),
        "tl.store(counts_ptr + head, count)",
    ]


def tile_of_list() -> list[str]:
    """From `tile`, `h` and `b`: the rows `q` of the tile, and `q0, q1`, between which they lie."""
    return [
        "listed = tl.load(counts_ptr + b * HEADS + h)",
        "place = tile * BLOCK_M",
        "if place >= listed:",
        "    return",
        "places = places_ptr + (tl.cast(b, tl.int64) * HEADS + h) * n_q",
        "q0 = tl.load(places + place)",
        "q1 = tl.load(places + tl.minimum(place + BLOCK_M, listed) - 1) + 1",
        "q = tl.load(places + tl.minimum(place + tl.arange(0, BLOCK_M)[:, None], listed - 1))",
    ]


def launch_list() -> list[str]:
    """Statements of the launcher before those that launch."""
    return [
        "places = q.new_empty((batch, heads, n_q), dtype=torch.int32)",
        "counts = q.new_empty((batch, heads), dtype=torch.int32)",
    ]
