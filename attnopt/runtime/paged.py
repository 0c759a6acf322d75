"""The graph-visible operator `attnopt::paged_attention` and its fake rule."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnopt.errors import CompileError
from attnopt.runtime import dispatch, triton_launch
from attnopt.runtime.pages import Operands, gathered
from attnopt.runtime.triton_paged import backend
from attnopt.spec import AttentionSpec

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor page_table, Tensor key_lengths, Tensor[] new, "
    "Tensor[] captures, SymInt[] scalars, str spec) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OPERATOR = torch.ops.attnopt.paged_attention.default


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> AttentionSpec:
    return AttentionSpec.parse(text).canonical()


def run(spec: AttentionSpec, given: Operands) -> tuple[Tensor, Tensor | None]:
    """By kernels where Triton runs, else by the definition."""
    active = dispatch.current()
    some = 0 not in (*given.q.shape, *given.page_table.shape, len(given.keys))
    if some and triton_launch.runs_on(given.q.device, active.options):
        try:
            kernels = backend(spec, given, active.options, active.warn)
            if not kernels.problem:
                return kernels(given, active.options.first_use_check)
            problem = kernels.problem
        except CompileError as error:
            problem = str(error)
        active.warn(f"no kernel reads these pages: {problem.rstrip('.')}. They are gathered instead.")
    return gathered(spec, given)


def _forward(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, key_lengths: Tensor, new: list[Tensor],
    captures: list[Tensor], scalars: list[int], spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wanted = _parsed(spec)
    given = Operands(q, keys, values, page_table, key_lengths, tuple(captures), tuple(scalars), tuple(new))
    out, lse = run(wanted, given)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    if lse is None or "lse" not in wanted.returns:
        return out, q.new_empty(0, dtype=torch.float32)
    return out, lse.to(torch.float32).contiguous()


_LIBRARY.impl("paged_attention", _forward, "CPU")
_LIBRARY.impl("paged_attention", _forward, "CUDA")


@torch.library.register_fake("attnopt::paged_attention", lib=_LIBRARY)
def _fake(
    q: Tensor, keys: Tensor, values: Tensor, page_table: Tensor, key_lengths: Tensor, new: list[Tensor],
    captures: list[Tensor], scalars: list[int], spec: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, rows, _ = q.shape
    out = q.new_empty((batch, rows, heads, values.shape[3])).transpose(1, 2)
    shape = (batch, heads, rows) if "lse" in _parsed(spec).returns else (0,)
    return out, q.new_empty(shape, dtype=torch.float32)
