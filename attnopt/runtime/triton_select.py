"""The choice of blocks by generated Triton kernels: on the device from the inputs to the list that a kernel goes by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_plans import Chip
from attnopt.codegen.triton_select import emit_select, select_plans, supported_select
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime.capturing import recorded
from attnopt.runtime.chosen import _candidates, _kept, _own, chosen
from attnopt.runtime.inputs import dtype_name
from attnopt.runtime.lists import sizes_of
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_launch import chip_of, on, runs_on
from attnopt.spec import AttentionSpec

Warn = Callable[[str], None]
# Of so many rows of a choice one may differ from torch's: sums in another order end otherwise where two blocks tie.
_TIES = 500


class Chooser:
    """The kernels of one spec, dtype and chip; `problem` is why they may not be used."""

    def __init__(self, spec: AttentionSpec, dtype: str, chip: Chip, ahead: Ahead | None = None) -> None:
        self.ahead = ahead or Ahead(chip, None)
        self.spec, self.problem, self.checked = spec, supported_select(spec, Layout(dtype)) or "", False
        self.kernels: list[TritonKernel] = []
        self.fixed: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        if not self.problem:
            plans = select_plans(chip, dtype, spec.heads.d_qk, spec.heads.d_v)
            self.kernels = self.ahead.first([emit_select(spec, Layout(dtype), plan) for plan in plans])

    def __call__(self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        """What the spec chooses, bool `[B, Hq, tiles, blocks]`. Raises `CompileError`."""
        spec, select = self.spec, self.spec.select
        assert select is not None
        sizes = sizes_of(spec, q, k, scalars)
        named = {c.name: t for c, t in zip(spec.captures, captures, strict=True)}
        classes = _candidates(spec, (select.tile, select.block)).classes(sizes, named, q.device)
        if select.shared and classes.shape[1] > 1:
            raise CompileError("the Triton kernel lets heads choose together only under one mask")
        one, own, amounts = self._fixed(q.device)
        kept = _kept(spec, sizes, named, q.device)
        if select.own is not None:
            low, high = _own(select, select.own, sizes, named, q.device)
            own = torch.stack([low[:, 0], high[:, 0]], -1).to(torch.int32).contiguous()
        given = (q, k, one if kept is None else kept.to(torch.uint8), classes, own, amounts)
        with on(q.device):
            made: Tensor = launch(self.kernels, given, {}, "choose", self.ahead.module)
        found = made.view(torch.bool)
        if not select.shared:
            return found
        group = spec.heads.q // spec.heads.k
        return found.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)

    def _fixed(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What no input decides, made once for a device: that every key counts, no block of its own, the amounts."""
        if device not in self.fixed:
            assert self.spec.select is not None
            amounts = torch.tensor([float(x) for x in self.spec.select.amount], dtype=torch.float32, device=device)
            one = torch.ones((1, 1), dtype=torch.uint8, device=device)
            self.fixed[device] = one, torch.tensor([[[1, 0]]], dtype=torch.int32, device=device), amounts
        return self.fixed[device]


_KNOWN: dict[Any, Chooser] = {}
_LOCK = threading.Lock()


def choice(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    options: Options,
    warn: Warn,
) -> Tensor:
    """What `spec.select` chooses, bool `[B, Hq, tiles, blocks]`: by kernels where Triton runs, else as `chosen`.

    The same inputs give the same choice, forward and backward. The first one of a spec is compared with torch's.
    """
    if not runs_on(q.device, options) or 0 in (*q.shape, k.shape[2]) or q.dtype == torch.float64:
        return chosen(spec, q, k, captures, scalars)
    try:
        chooser = _chooser(spec, q, options, warn)
        if not chooser.problem:
            found = chooser(q, k, captures, scalars)
            if chooser.checked or recorded(q) or not options.first_use_check:
                return found
            chooser.problem, chooser.checked = disagreement(found, chosen(spec, q, k, captures, scalars)), True
            if not chooser.problem:
                return found
        problem = chooser.problem
    except AttnoptError as error:
        problem = str(error)
    warn(f"no Triton kernel chooses blocks: {problem.rstrip('.')}. Torch's operators choose them instead.")
    return chosen(spec, q, k, captures, scalars)


def _chooser(spec: AttentionSpec, q: Tensor, options: Options, warn: Warn) -> Chooser:
    key = spec.key, q.dtype, q.device.type, options
    with _LOCK:
        if key not in _KNOWN:
            chip = chip_of(q.device)
            _KNOWN[key] = Chooser(spec, dtype_name(q.dtype), chip, Ahead(chip, options, warn))
        return _KNOWN[key]


def disagreement(found: Tensor, expected: Tensor) -> str:
    """Why a choice is not trusted: more of its rows differ from the expected one than ties explain; empty if it is."""
    rows = (found != expected).any(-1)
    wrong, most = int(rows.sum()), max(1, rows.numel() // _TIES)
    return "" if wrong <= most else f"{wrong} of {rows.numel()} tiles chose other blocks than the reference"
