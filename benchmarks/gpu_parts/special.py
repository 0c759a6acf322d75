"""Rows whose kernel has no plans to choose from: linear attention, and maps of blocks. They run as models run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.aot.standard import layout_for
from attnopt.codegen.triton_linear import linear_plans, supported_linear
from attnopt.codegen.triton_plans import Chip
from attnopt.options import Options
from attnopt.runtime import dispatch
from attnopt.runtime.op import attention
from attnopt.runtime.triton_launch import build
from attnopt.spec import AttentionSpec, Capture, Pointwise
from gpu_parts.rows import BLOCK, Row


def spec_of(row: Row) -> AttentionSpec:
    """Causal linear attention of positive features; or softmax over the blocks that a map of each head names."""
    heads = row.heads
    if row.kind == "linear":
        least = ex.Maximum(ex.t, sp.Rational(1, 10**6))
        return AttentionSpec(heads, ex.s, ex.k <= ex.q, Pointwise(least)).canonical()
    block = ex.load("blocks", ex.h, ex.FloorDiv(ex.q, BLOCK), ex.FloorDiv(ex.k, BLOCK), integer=True)
    scaled = ex.number(heads.d_qk**-0.5) * ex.s
    return AttentionSpec(heads, scaled, sp.Ne(block, 0), captures=(Capture("blocks", "int", (None,) * 3),))


def inputs(row: Row, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and, for a map, int64 `[H, n_q / BLOCK, n_k / BLOCK]` with equally many blocks in every row."""
    heads = row.heads
    shapes = ((heads.q, row.n_q, heads.d_qk), (heads.k, row.n_k, heads.d_qk), (heads.v, row.n_k, heads.d_v))
    q, k, v = (torch.randn(row.batch, *shape, device=device, dtype=dtype) for shape in shapes)
    if row.kind == "linear":
        return [q.abs(), k.abs(), v]
    size = heads.q, row.n_q // BLOCK, row.n_k // BLOCK
    place = torch.rand(size, device=device).argsort(-1).argsort(-1)
    return [q, k, v, (place < round(row.kept * size[2])).to(torch.int64)]


def call(row: Row, dtype: torch.dtype, device: str, options: Options) -> tuple[Callable[[], Any], list[Tensor]]:
    """The row through the operator, whatever the dispatcher takes for it, and its tensors."""
    text, tensors = spec_of(row).text, inputs(row, dtype, device)
    q, k, v, *captures = tensors

    def run() -> Tensor:
        with dispatch.use(options):
            return attention(text, q, k, v, captures)[0]

    return run, tensors


def proven(row: Row, chip: Chip, tensors: list[Tensor], dtype: str) -> str:
    """What is known before a launch: a kernel of chunks and its plan, or the plan of a list of blocks that pays."""
    spec = spec_of(row)
    if row.kind == "linear":
        found = linear_plans(chip, dtype, row.heads.d_qk, row.heads.d_v)
        return str(found[0]) if found else str(supported_linear(spec, layout_for(spec, dtype)))
    backend = build(spec, layout_for(spec, dtype), chip, Options())
    assert backend.listed.pays(tensors[0], tensors[1], ())
    return str(backend.listed.kernels[0].plan)


def used(row: Row, options: Options) -> str:
    """Which backend ran the row, after it ran."""
    with dispatch.use(options):
        return dispatch.kernel_used(spec_of(row).key) or ""
