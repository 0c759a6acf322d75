"""Triton kernels as a backend: from a spec, a layout and a device to a callable on CUDA tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import dump
from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_decode import group
from attnopt.codegen.triton_fit import chosen, fitting
from attnopt.codegen.triton_plans import CHIPS, PLANS, Chip, TritonPlan, wants_split
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import lists
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.capturing import capturing, refuse
from attnopt.runtime.triton_ahead import Ahead, Warn, log
from attnopt.runtime.triton_call import launch, tuned
from attnopt.runtime.triton_lists import Visits
from attnopt.runtime.triton_load import load
from attnopt.runtime.triton_tune import Tuner
from attnopt.spec import AttentionSpec

# Compute capabilities with a table of plans. Others may have less shared memory than any plan needs.
_CAPABILITIES = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100",
    (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip
# Offsets within a tile and coordinates are of 32 bits.
_OFFSET, _PLACE, _SCALAR = 1 << 31, 1 << 24, 1 << 30
# Sizes whose kernels are remembered.
_KEPT = 4096


def runs_on(device: torch.device, options: Options) -> bool:
    """Whether these options run Triton kernels there: on a GPU, or by name on the CPU under Triton's interpreter."""
    if options.disable or options.kernel not in ("auto", "triton"):
        return False
    return device.type == "cuda" or (device.type == "cpu" and options.kernel == "triton" and interpreted())


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (`TRITON_INTERPRET=1`). Starts no driver."""
    with contextlib.suppress(ImportError, AttributeError):
        from triton import knobs

        return bool(knobs.runtime.interpret)
    return False


def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA or ROCm device; any one for the interpreter. Raises `CompileError` if it has no plans."""
    if device.type == "cpu":
        return CHIPS["sm_80"]
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if name in CHIPS:
            return CHIPS[name]
        raise CompileError(f"no plans are known for {name}; they are for {', '.join(CHIPS)}")
    found = torch.cuda.get_device_capability(device)
    if found in _CAPABILITIES:
        return CHIPS[_CAPABILITIES[found]]
    number = f"{found[0]}.{found[1]}"
    raise CompileError(f"no plans are known for compute capability {number}; they are for {', '.join(CHIPS)}")


def build(spec: AttentionSpec, layout: Layout, chip: Chip, options: Options, warn: Warn = log.warning) -> TritonBackend:
    """The backend of a spec on a chip. Raises `CompileError` with the reason where there is none.

    Nothing is compiled before the first call, and then only what the folder of `Options.aot_dir` does not hold;
    `warn` hears why something of it is not used.
    """
    problem = triton.supported(spec, layout)
    if problem is not None:
        raise CompileError(problem)
    heads, found = spec.heads, fitting(spec, chip, layout.dtype, "forward")
    if not found:
        raise CompileError(f"no plan for heads of {heads.d_qk}/{heads.d_v} in {layout.dtype} fits {chip.name}")
    kernels = [triton.emit(spec, layout, plan) for plan in found]
    dump.kernel(options.dump, f"{spec.key[:16]}_{kernels[0].key[:8]}.py", kernels[0].source)
    load(kernels[0])  # says now, not at the first call, that there is no Triton
    whole = spec.rows == sp.true
    split = [triton.emit_decode(spec, layout, plan) for plan in fitting(spec, chip, layout.dtype, "decode") if whole]
    masked = whole and spec.keep != sp.true
    by_list = (replace(plan, listed=True) for plan in PLANS["forward"](chip, layout.dtype, heads.d_qk, heads.d_v))
    by_list = chosen(by_list, spec, chip, layout.dtype, "forward") if masked else ()
    listed = [triton.emit(spec, layout, plan) for plan in by_list]
    tuner = Tuner(spec, layout.dtype, chip, options)
    return TritonBackend(spec, chip, kernels, split, Ahead(chip, options, warn), listed, tuner)


class TritonBackend:
    """Launches the first of the kernels that fits, compiled at the first call or ahead of time."""

    name = "triton"

    def __init__(
        self,
        spec: AttentionSpec,
        chip: Chip,
        kernels: Sequence[TritonKernel],
        split: Sequence[TritonKernel] = (),
        ahead: Ahead | None = None,
        listed: Sequence[TritonKernel] = (),
        tuner: Tuner | None = None,
    ) -> None:
        self.spec, self.chip, self.ahead = spec, chip, ahead or Ahead(chip, None)
        self.kernels, self.split = self.ahead.first(kernels), self.ahead.first(split)
        self.tuner = tuner
        self.chosen: dict[tuple[Any, ...], list[TritonKernel]] = {}
        self.rows = group(spec)
        self.by_data = by_data(spec)
        self.listed = Listed(spec, listed)

    @property
    def kernel(self) -> TritonKernel:
        """The kernel that runs."""
        return self.kernels[0]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """`out` in its final layout, and lse if the spec returns it. Raises `CompileError` if no kernel runs."""
        problem = far(q, k, v, scalars, max(x.plan.block_n for x in (*self.kernels, *self.split)))
        if problem:
            raise CompileError(problem)
        with on(q.device):
            arguments = (q, k, v, *captures, *scalars)
            if self.listed.pays(q, k, scalars):
                visited = self.listed
                return launch(visited.kernels, arguments, lambda plan: {"visited": visited(plan, arguments)})
            kind = self.kind(q, k)
            return launch(self._for(kind, arguments), arguments, self._more(kind), module_of=self.ahead.module)

    def _more(self, kind: str) -> dict[str, int]:
        return {"processors": self.chip.processors} if kind == "decode" else {}

    def _for(self, kind: str, arguments: tuple[Any, ...]) -> list[TritonKernel]:
        """The kernels for these sizes, best first: what was measured to be fastest, then the default."""
        q, k = arguments[:2]
        place = kind, q.shape[0], q.shape[2], k.shape[2]
        found = self.chosen.get(place)
        if found is None:
            found = usual = self.split if kind == "decode" else self.kernels
            if self.tuner is not None and not self.ahead.holds(usual[0]):  # what is there needs no compiler
                make = triton.EMIT[kind]
                run = lambda kernel: launch([kernel], arguments, self._more(kind))  # noqa: E731
                found = tuned(self.tuner, kind, usual, lambda plan: make(self.spec, usual[0].layout, plan), run, q, k)
            if len(self.chosen) >= _KEPT:
                self.chosen.clear()
            if not capturing():
                self.chosen[place] = found
        return found

    def variant(self, q: Tensor, k: Tensor) -> str:
        """What runs at these sizes, in words: kernels of one name are the same kernels."""
        kind = self.kind(q, k)
        found = self.chosen.get((kind, q.shape[0], q.shape[2], k.shape[2]))
        return f"{kind} {found[0].plan}" if found else kind

    def kind(self, q: Tensor, k: Tensor) -> str:
        """Which kernel runs at these sizes: `forward` or `decode`."""
        batch, heads, n_q, _ = q.shape
        programs = batch * heads * -(-n_q // self.kernel.plan.block_m)
        split = self.split and wants_split(self.chip, programs, self.rows * n_q, k.shape[2])
        return "decode" if split else "forward"

    def leaves(
        self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], data_only: bool = False
    ) -> str | None:
        """Which load leaves its tensor at these sizes, in words; None if none does.

        Raises `CompileError` while a CUDA graph is recorded, where this cannot be found out.
        """
        refuse(q, data_only, self.by_data, captures)
        return outside(self.spec, q, k, captures, scalars, data_only)


class Listed:
    """Kernels that go by lists of tiles, and their lists, for which the host waits for no data of a device."""

    def __init__(self, spec: AttentionSpec, kernels: Sequence[TritonKernel]) -> None:
        self.spec, self.kernels = spec, list(kernels)
        self.known: dict[tuple[int, ...], bool] = {}
        self.lists: dict[tuple[int, int], lists.Lists] = {}
        self.visits: dict[tuple[int, int], Visits] = {}

    def pays(self, q: Tensor, k: Tensor, scalars: Sequence[int]) -> bool:
        """Whether these sizes are better served by a list."""
        if not self.kernels:
            return False
        key = (q.shape[0], q.shape[2], k.shape[2], *map(int, scalars))
        if key not in self.known:
            if len(self.known) >= _KEPT:
                self.known.clear()
            plan = self.kernels[0].plan
            made = self._lists((plan.block_m, plan.block_n))
            sizes = lists.sizes_of(self.spec, q, k, scalars)
            able = made.static or bool(made.coarse) or (q.is_cuda and lists.apart(made, sizes))
            self.known[key] = able and lists.pay(self.spec, sizes, made.block)
        return self.known[key]

    def __call__(self, plan: TritonPlan, arguments: Sequence[Any]) -> Tensor:
        """The list for the tiles of a plan, with a row for every batch entry and head."""
        q, k, _, *rest = arguments
        count, block = len(self.spec.captures), (plan.block_m, plan.block_n)
        given, made = (q, k, rest[:count], rest[count:]), self._lists(block)
        if q.is_cuda or interpreted():
            if block not in self.visits:
                self.visits[block] = Visits(self.spec, made)
            written = self.visits[block](*given)
            if written is not None:
                return written
        return made(*given).expand(q.shape[0], q.shape[1], -1, -1)

    def _lists(self, block: tuple[int, int]) -> lists.Lists:
        if block not in self.lists:
            self.lists[block] = lists.Lists(self.spec, block, ragged=True)
        return self.lists[block]


def far(q: Tensor, k: Tensor, v: Tensor, scalars: Sequence[int], block: int) -> str:
    """Why offsets or coordinates need more bits than a kernel has; empty if they do not."""
    if max(q.shape[2], k.shape[2]) >= _PLACE:
        return f"a length of {max(q.shape[2], k.shape[2])} is more than the Triton kernel counts to"
    if any(abs(int(x)) >= _SCALAR for x in scalars):
        return "a scalar is larger than the Triton kernel's integers"
    if any(abs(t.stride(2)) * block + abs(t.stride(3)) * t.shape[3] >= _OFFSET for t in (k, v)):
        return "keys lie further apart than the Triton kernel's offsets reach"
    return wide(q)


def wide(rows: Tensor) -> str:
    """Why offsets within a row `[..., d]` need more bits than a kernel has; empty if they do not."""
    if abs(rows.stride(3)) * rows.shape[3] >= _OFFSET:
        return "elements of a row lie further apart than the Triton kernel's offsets reach"
    return ""


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, so this one has to be it."""
    if torch.cuda.device_count() < 2:
        return contextlib.nullcontext()
    return torch.cuda.device(device)
