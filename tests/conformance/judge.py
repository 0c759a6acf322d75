"""Inputs of every kind of layout, and the judgement of a backend's result against fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.returns import of_rows
from attnopt.runtime.native import check_rows
from attnopt.runtime.validate import Verdict
from attnopt.spec import AttentionSpec

LAYOUTS = ("contiguous", "transposed", "broadcast", "sliced")


def tensors(
    spec: AttentionSpec, batch: int, n_q: int, n_k: int, layout: str, dtype: torch.dtype, size: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in this layout, with standard deviation `size`."""
    heads, generator = spec.heads, torch.Generator().manual_seed(seed)

    def draw(count: int, length: int, width: int) -> Tensor:
        shape = [1 if layout == "broadcast" else batch, count, length, width]
        if layout == "transposed":
            shape = [batch, length, count, width]
        if layout == "sliced":
            shape[3] = 2 * width
        made = (size * torch.randn(shape, generator=generator)).to(dtype)
        if layout == "transposed":
            return made.transpose(1, 2)
        return made[..., ::2] if layout == "sliced" else made.expand(batch, -1, -1, -1)

    return draw(heads.q, n_q, heads.d_qk), draw(heads.k, n_k, heads.d_qk), draw(heads.v, n_k, heads.d_v)


def judge(
    spec: AttentionSpec,
    inputs: tuple[Tensor, Tensor, Tensor],
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    result: tuple[Tensor, Tensor | None],
) -> Verdict:
    """The verdict on all rows of out and of the side outputs that the spec returns, each by itself."""
    lse = result[1] if of_rows(spec.returns) else None
    return check_rows(spec, inputs, captures, scalars, result[0], lse, rows=inputs[0].shape[2])
