"""Triton kernels that read keys and values in pages, chosen, launched, and compared with the definition at first."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_decode import group
from attnopt.codegen.triton_fit import fitting
from attnopt.codegen.triton_pages import NEW
from attnopt.codegen.triton_plans import Chip, wants_split
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.capturing import recorded, refuse
from attnopt.runtime.native import check_entries, layout_of
from attnopt.runtime.pages import Operands, entry
from attnopt.runtime.triton_ahead import Ahead, Warn, log
from attnopt.runtime.triton_call import launch
from attnopt.runtime.triton_launch import chip_of, far, on
from attnopt.spec import AttentionSpec


class Paged:
    """The kernels of one spec, layout and chip. `problem`: why they may not be used; empty if they may."""

    def __init__(self, spec: AttentionSpec, layout: Layout, chip: Chip, ahead: Ahead | None = None) -> None:
        self.spec, self.chip, self.rows = spec, chip, group(spec)
        self.ahead = ahead or Ahead(chip, None)
        self.problem = triton.supported(spec, layout) or ""
        self.kernels: dict[str, list[TritonKernel]] = {"forward": [], "decode": []}
        self.checked: set[tuple[Any, ...]] = set()
        self.inside: set[tuple[Any, ...]] = set()
        if self.problem:
            return
        emit = {"decode": triton.emit_decode} | ({"forward": triton.emit} if spec.rows == sp.true else {})
        for kind, make in emit.items():
            made = [make(spec, layout, plan) for plan in fitting(spec, chip, layout.dtype, kind)]
            self.kernels[kind] = self.ahead.first(made)
        if not any(self.kernels.values()):
            self.problem = f"no plan for heads of {spec.heads.d_qk}/{spec.heads.d_v} fits {chip.name}"
        elif by_data(spec):
            self.problem = "the kernel of pages loads nothing whose place depends on a tensor's content"

    def kind(self, given: Operands) -> str:
        """Which kernels run at these sizes: `forward` or `decode`."""
        if not all(self.kernels.values()):
            return next(kind for kind, found in self.kernels.items() if found)
        batch, heads, n_q, _ = given.q.shape
        programs = batch * heads * -(-n_q // self.kernels["forward"][0].plan.block_m)
        return "decode" if wants_split(self.chip, programs, self.rows * n_q, given.room) else "forward"

    def __call__(self, given: Operands, compare: bool) -> tuple[Tensor, Tensor | None]:
        """`out` and the lse if the spec returns it; with `compare` those of new sizes are compared with the definition.

        Raises `CompileError` if no kernel runs or one is wrong, and `ShapeError` where a comparison reads a length or
        a page that is out of range.
        """
        # As the kernels see them: [pages, H, page, d].
        k, v = given.keys.transpose(1, 2), given.values.transpose(1, 2)
        new = [t.transpose(1, 2) for t in given.new]
        problem = far(given.q, k, v, given.scalars, given.page) or self._leaves(given)
        if problem:
            raise CompileError(problem)
        kind = self.kind(given)
        more: dict[str, Any] = {"page_table": given.page_table, "key_lengths": given.key_lengths}
        more |= dict(zip(NEW, new, strict=False))
        more |= {"processors": self.chip.processors} if kind == "decode" else {}
        with on(given.q.device):
            operands = (given.q, k, v, *given.captures, *given.scalars)
            out, lse = launch(self.kernels[kind], operands, more, module_of=self.ahead.module)
        tag = kind, given.q.shape[2].bit_length(), given.room.bit_length()
        if compare and tag not in self.checked and not recorded(given.q):
            self._compare(given, out, lse)
            self.checked.add(tag)
        return out, lse

    def _compare(self, given: Operands, out: Tensor, lse: Tensor | None) -> None:
        lengths = given.lengths
        some = [b for b, length in enumerate(lengths) if length]
        for b in sorted({*some[:1], *some[-1:]}):
            inputs = given.q[b : b + 1], *entry(given, b, lengths[b])
            place = torch.tensor([b])
            verdict = check_entries(
                self.spec, inputs, given.captures, given.scalars, (out, lse), place, given.q.shape[0]
            )
            if not verdict.ok:
                self.problem = f"the kernel of pages disagrees with the definition and is switched off ({verdict})"
                raise CompileError(self.problem)

    def _leaves(self, given: Operands) -> str:
        """Which load leaves its tensor, in words; empty if none does. Reads lengths where they have to be known."""
        if not given.captures:
            return ""
        of_length = any(ex.depends(load, ex.n_k) for load in ex.loads(*self.spec.expressions.values()))
        sizes = given.q.shape, given.room, *(t.shape for t in given.captures), *given.scalars
        known = sizes in self.inside
        refuse(given.q, known, False, given.captures)
        if known:
            return ""
        if not of_length and self._outside(given, given.room) is None:
            self.inside.add(sizes)
            return ""
        most = given.room - given.n_new
        lengths = [n + given.n_new for n in given.key_lengths.clamp(0, most).unique().tolist()]
        found = (self._outside(given, n) for n in (lengths if of_length else lengths[-1:]) if n)
        return next((x for x in found if x), "")

    def _outside(self, given: Operands, n_k: int) -> str | None:
        keys = torch.empty((1, 1, n_k, 1), device="meta")
        return outside(self.spec, given.q, keys, given.captures, given.scalars)


_KNOWN: dict[tuple[Any, ...], Paged] = {}
_LOCK = threading.Lock()


def backend(spec: AttentionSpec, given: Operands, options: Options, warn: Warn = log.warning) -> Paged:
    """The kernels for these operands, made once. Raises `CompileError` for a chip without plans."""
    layout = replace(layout_of(k_axes(spec), given.q, given.captures), page=given.page, new=bool(given.new))
    key = spec.key, layout, str(given.q.device), options
    with _LOCK:
        if key not in _KNOWN:
            chip = chip_of(given.q.device)
            _KNOWN[key] = Paged(spec, layout, chip, Ahead(chip, options, warn))
        return _KNOWN[key]
