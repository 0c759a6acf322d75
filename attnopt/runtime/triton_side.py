"""Column mass and weights by generated Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attnopt.codegen.base import Layout
from attnopt.codegen.triton_kinds import proposed
from attnopt.codegen.triton_plans import Chip
from attnopt.codegen.triton_side import emit_side, supported_side
from attnopt.errors import CompileError
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_launch import far, on
from attnopt.spec import AttentionSpec


class TritonSide:
    """The kernels of one spec, layout and chip; `problem` is why there are none."""

    def __init__(self, spec: AttentionSpec, layout: Layout, chip: Chip, ahead: Ahead | None = None) -> None:
        self.ahead = ahead or Ahead(chip, None)
        self.spec, self.problem = spec, supported_side(spec, layout) or ""
        plans = () if self.problem else proposed("side", spec, chip, layout.dtype)
        self.kernels = self.ahead.first([emit_side(spec, layout, plan) for plan in plans])
        if not self.problem and not plans:
            self.problem = f"no plan for heads of {spec.heads.d_qk} fits {chip.name}"

    def __call__(
        self, q: Tensor, k: Tensor, rows: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str
    ) -> Tensor:
        """As the operator, but that rows without keys have not been added to a column. Raises `CompileError`."""
        scalars = scalars[: len(self.spec.scalars)]
        problem = far(q, k, k, scalars, max(kernel.plan.block_n for kernel in self.kernels))
        if problem:
            raise CompileError(problem)
        with on(q.device):
            given = (q, k, *captures, *scalars, rows, name)
            made: Tensor = launch(self.kernels, given, {}, "attention_side", self.ahead.module)
            return made
