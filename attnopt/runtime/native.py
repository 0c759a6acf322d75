"""A generated kernel as a backend: raw pointers and strides, checked before it is trusted."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt.codegen.base import CaptureLayout, Layout, Plan
from attnopt.errors import CompileError
from attnopt.returns import of_rows
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.compile import Library
from attnopt.runtime.inputs import dtype_name
from attnopt.runtime.lists import Lists
from attnopt.runtime.reference import Sample, reference
from attnopt.runtime.validate import Verdict, compare, nudge
from attnopt.spec import AttentionSpec

_ROWS = 8
# How many times as many where only some rows are computed.
_PART = 4
_KNOWN = 1024
_HEADS_BUDGET = 1 << 22


def layout_of(axes: tuple[int | None, ...], q: Tensor, captures: Sequence[Tensor]) -> Layout:
    """The layout class of these inputs. `axes` comes from `k_axes`."""
    about = []
    for tensor, axis in zip(captures, axes, strict=True):
        stride = None if axis is None else tensor.stride(axis)
        about.append(CaptureLayout(dtype_name(tensor.dtype), stride if stride in (0, 1) else None))
    return Layout(dtype_name(q.dtype), tuple(about))


def lists_of(spec: AttentionSpec, plan: Plan) -> Lists | None:
    """What makes the lists that a plan goes by: for all query heads of a key head together in the `stream` form."""
    if not plan.listed:
        return None
    heads = spec.heads
    groups = [[h for h in range(heads.q) if heads.k_map[h] == head] for head in range(heads.k)]
    return Lists(spec, (plan.block_q, plan.listed), groups if plan.form == "stream" else ())


def list_numbers(visited: Tensor) -> list[int]:
    """Strides of batch, heads and tiles of a list, none along a dimension of size 1, and the most blocks of a tile."""
    strides = [0 if n == 1 else x for n, x in zip(visited.shape, visited.stride(), strict=True)]
    return [*strides[:3], visited.shape[3] - 2]


class Native:
    """Runs a loaded kernel of one plan."""

    name = "cpp"

    def __init__(self, spec: AttentionSpec, library: Library, plan: Plan | None = None) -> None:
        self.spec, self.library, self.plan = spec, library, plan or Plan()
        self.side_outputs = len(of_rows(spec.returns))
        self.by_data = by_data(spec)
        self.lists = lists_of(spec, self.plan)
        self.pointers = ctypes.c_void_p * (3 + len(spec.captures) + (self.lists is not None))
        self.known: dict[tuple[Any, ...], ctypes.Array[ctypes.c_int64]] = {}
        count = 19 + sum(len(c.shape) for c in spec.captures) + len(spec.scalars)
        self.numbers = ctypes.c_int64 * (count + (0 if self.lists is None else 4))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """`out` in its final layout, and the side outputs of rows. Raises `CompileError` if the kernel refuses."""
        key: tuple[Any, ...] = (q.shape, k.shape[2], q.stride(), k.stride(), v.stride())
        if captures or scalars:
            key = (*key, *[t.stride() for t in captures], *scalars)
        further = captures
        if self.lists is not None:
            visited = self.lists(q, k, captures, scalars)
            further, key = (*captures, visited), (*key, visited.shape)
        numbers = self.known.get(key) or self._numbers(key, v.shape[3], further, scalars)
        return self.launch(q, k, v, further, numbers)

    def launch(
        self, q: Tensor, k: Tensor, v: Tensor, further: Sequence[Tensor], numbers: ctypes.Array[ctypes.c_int64]
    ) -> tuple[Tensor, Tensor | None]:
        """As a call, with the sizes and strides that were found for tensors like these, and with the list, if any."""
        batch, heads, rows, _ = q.shape
        width = v.shape[3]
        out = torch.empty_strided(
            (batch, heads, rows, width), (rows * heads * width, width, heads * width, 1), dtype=q.dtype
        )
        lse = None
        if self.side_outputs:
            sizes = (batch, heads, rows, self.side_outputs)[: 3 + (self.side_outputs > 1)]
            lse = torch.empty(sizes, dtype=torch.float32)
        status = self.library.run(
            self.pointers(q.data_ptr(), k.data_ptr(), v.data_ptr(), *[t.data_ptr() for t in further]),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
            numbers,
            torch.get_num_threads(),
        )
        if status:
            raise CompileError("the kernel ran out of memory" if status == 1 else f"the kernel refused with {status}")
        return out, lse

    def numbers_of(self, q: Tensor, k: Tensor, v: Tensor) -> ctypes.Array[ctypes.c_int64] | None:
        """Sizes and strides of a call without captures and scalars that was made before; None where more decides."""
        if self.lists is not None or self.by_data or self.spec.captures or self.spec.scalars:
            return None
        return self.known.get((q.shape, k.shape[2], q.stride(), k.stride(), v.stride()))

    def _numbers(
        self, key: tuple[Any, ...], width: int, further: Sequence[Tensor], scalars: Sequence[int]
    ) -> ctypes.Array[ctypes.c_int64]:
        """Sizes, strides and scalars as the kernel reads them, kept for the next call that has the same."""
        (batch, heads, rows, _), n_k, *strides = key
        out = (rows * heads * width, width, heads * width, 1)
        flat = [batch, rows, n_k, *(x for stride in strides[:3] for x in stride), *out]
        captures, visited = further[: len(self.spec.captures)], further[len(self.spec.captures) :]
        flat += [x for tensor in captures for x in tensor.stride()]
        scalars = [*scalars[: len(self.spec.scalars)], *[x for tensor in visited for x in list_numbers(tensor)]]
        if len(self.known) >= _KNOWN:
            self.known.clear()
        self.known[key] = self.numbers(*flat, *scalars)
        return self.known[key]

    def leaves(
        self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], data_only: bool = False
    ) -> str | None:
        """Which load leaves its tensor at these sizes, in words; None if none does."""
        return outside(self.spec, q, k, captures, scalars, data_only)


def check_rows(
    spec: AttentionSpec,
    inputs: tuple[Tensor, Tensor, Tensor],
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    out: Tensor,
    lse: Tensor | None,
    rows: int = _ROWS,
) -> Verdict:
    """Compare sampled rows of a kernel's result with the reference in fp64 and in the run's dtype."""
    batch, whole = _spread(inputs[0].shape[0], 2), inputs[0].shape[0]
    q, k, v = (t if batch.numel() == whole else _pick(t, batch) for t in inputs)
    return check_entries(spec, (q, k, v), captures, scalars, (out, lse), batch, whole, rows)


def check_entries(
    spec: AttentionSpec,
    inputs: tuple[Tensor, Tensor, Tensor],
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    result: tuple[Tensor, Tensor | None],
    batch: Tensor,
    whole: int,
    rows: int = _ROWS,
) -> Verdict:
    """As `check_rows`, where q, k and v hold only the entries `batch` of a batch of the size `whole`; results all."""
    (q, k, v), (out, lse) = inputs, result
    rows *= 1 if spec.rows == sp.true else _PART  # rows that are not computed are zeros and say nothing
    width = k.shape[2] * (k.shape[3] + v.shape[3]) * batch.numel()
    heads, places = _spread(q.shape[1], max(2, _HEADS_BUDGET // max(1, width))), _spread(q.shape[2], rows)
    taken = Sample(batch, heads, places, whole)
    spec, k, v = _only(spec, heads, k, v)
    golden, golden_lse = reference(spec, q.double(), k.double(), v.double(), captures, scalars, sample=taken)
    # Eager PyTorch would round scores and weights to the run's dtype: that is the error it is allowed.
    eager, eager_lse = reference(spec, q, k, v, captures, scalars, sample=taken, compute=q.dtype)
    parts = [(golden, eager, _pick(out, batch, heads, places))]
    if lse is not None:  # or the side outputs in its place, each by itself
        found = (golden_lse, eager_lse, _pick(lse, batch, heads, places))
        parts += [found] if lse.dim() == 3 else zip(*(t.unbind(-1) for t in found), strict=True)
    verdict = _first_wrong(parts)
    if verdict.ok:
        return verdict
    # Another order of the d products moves a score by more than eager's own order where eager sums in short runs and
    # the kernel in one: by what inputs that are off by sqrt(d/2) roundings do, here at two sigma.
    size = 2.0 * (1.0 + (q.shape[3] / 2) ** 0.5)
    runs = []
    for seed in range(3):
        moved = nudge(q, size, 2 * seed), nudge(k, size, 2 * seed + 1), v.double()
        runs.append(reference(spec, *moved, captures, scalars, sample=taken))
    flat = [(moved, *(rows.unbind(-1) if rows.dim() > 3 else (rows,))) for moved, rows in runs]
    return _first_wrong(parts, tuple(zip(*flat, strict=True)))


def _first_wrong(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], nudged: Sequence[Sequence[Tensor]] | None = None
) -> Verdict:
    """The verdict on the first of golden, eager and result, in this order, that is wrong; else on the first."""
    nudged = nudged or [()] * len(parts)
    verdicts = [compare(*part, nudged=runs) for part, runs in zip(parts, nudged, strict=False)]
    return next((v for v in verdicts if not v.ok), verdicts[0])


def _only(spec: AttentionSpec, heads: Tensor, k: Tensor, v: Tensor) -> tuple[AttentionSpec, Tensor, Tensor]:
    """The key and value heads that some query heads use, so that no other is copied, and the spec that says so."""
    found, maps, asked = [], [], heads.tolist()
    for tensor, table in ((k, spec.heads.k_map), (v, spec.heads.v_map)):
        used = sorted({table[h] for h in asked})
        found.append(tensor.index_select(1, torch.tensor(used, device=tensor.device)))
        maps.append(tuple(used.index(t) if t in used else 0 for t in table))
    sizes = {"k": found[0].shape[1], "v": found[1].shape[1], "k_map": maps[0], "v_map": maps[1]}
    return replace(spec, heads=replace(spec.heads, **sizes)), found[0], found[1]


def _spread(size: int, count: int) -> Tensor:
    """Up to `count` places over a range, its first and last among them."""
    # Integer arithmetic: fp32 has no room for every place of a long sequence.
    places = sorted({i * (size - 1) // max(1, min(size, count) - 1) for i in range(min(size, count))})
    return torch.tensor(places, dtype=torch.int64)


def _pick(tensor: Tensor, *indices: Tensor) -> Tensor:
    for dim, index in enumerate(indices):
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor
