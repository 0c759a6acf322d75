"""Lists of the blocks of keys that were chosen, written by a Triton kernel from the choice to what a forward reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.codegen.triton_select import emit_select
from attnopt.errors import CompileError
from attnopt.runtime.lists import Lists
from attnopt.runtime.triton_call import launch
from attnopt.select import Select
from attnopt.spec import AttentionSpec

log = logging.getLogger("attnopt")


class Visits:
    """The kernel for one mask; `name` is the capture that says which blocks were chosen, None if there is no such."""

    def __init__(self, spec: AttentionSpec, lists: Lists) -> None:
        self.lists, self.place = lists, chosen_capture(spec, lists)
        self.kernels: list[TritonKernel] = []
        if self.place is not None:
            one = lists.coarse[0]
            named = replace(spec, select=Select("topk", (sp.S.One,), one.keys, one.rows))
            self.kernels = [emit_select(named, Layout("float32"), TritonPlan(32, 32, 4, 2))]

    def __call__(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Tensor | None:
        """int32 `[B, Hq, tiles, 2 + blocks]` as `lists.packed` makes it; None where torch's operators have to."""
        if self.place is None or captures[self.place].dtype != torch.bool:
            return None
        chosen = captures[self.place].view(torch.uint8).expand(q.shape[0], q.shape[1], -1, -1)
        classes = self.lists.rest(q, k, captures, scalars)
        try:
            found: Tensor = launch(self.kernels, (chosen, classes, *self.lists.block, k.shape[2]), {}, "visits")
        except CompileError as error:
            log.info("no Triton kernel lists chosen blocks: %s. Torch's operators list them instead.", error)
            self.place = None
            return None
        return found


def chosen_capture(spec: AttentionSpec, lists: Lists) -> int | None:
    """The place of the capture that is all of the mask that is constant on blocks; None if it is none or more."""
    if len(lists.coarse) != 1:
        return None
    (one,) = lists.coarse
    load = one.condition.args[0] if isinstance(one.condition, sp.Ne) and one.condition.args[1] == 0 else None
    if not isinstance(load, ex.Load) or any(x & (x - 1) for x in (one.rows, one.keys)):
        return None
    rows = ex.q if one.rows == 1 else ex.FloorDiv(ex.q, one.rows)
    if load.args[1:] != (ex.b, ex.h, rows, ex.FloorDiv(ex.k, one.keys)):
        return None
    return [c.name for c in spec.captures].index(load.args[0].name)
