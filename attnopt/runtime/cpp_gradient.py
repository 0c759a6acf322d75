"""Gradients by C++ kernels on CPU tensors, from the saved result and lse; None where there are none."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from attnopt import dump
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_backward import emit_backward, undifferentiable
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.cpp_plans import backward_plan
from attnopt.codegen.cpp_tables import sum_type
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime import linear
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.build import build_kernel
from attnopt.runtime.compile import Library, find_compiler, vector_lanes
from attnopt.runtime.gradient import expected, telling
from attnopt.runtime.native import layout_of
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import compare, nudge
from attnopt.spec import AttentionSpec, Mixed, Softmax

log = logging.getLogger("attnopt")

# Queries and keys of the problem on which a kernel is compared with the reference before its first use: some tiles.
_SAMPLE = 136
Warn = Callable[[str], None]
Saved = tuple[Tensor | None, Tensor | None]


@functools.lru_cache(maxsize=4096)
def with_lse(text: str) -> str:
    """The spec that returns lse too, where gradients can be made from it; else the same."""
    spec = AttentionSpec.parse(text)
    heads = spec.heads
    shared = heads.k == heads.v and heads.k_map == heads.v_map
    plain = not spec.dropout and not spec.merge and spec.select is None and spec.rows == sp.true
    if not isinstance(spec.normalizer, Softmax) or not plain or not shared or set(spec.returns) - {"lse"}:
        return text
    return replace(spec, returns=("lse",)).text


def recorded_text(text: str, dtype: torch.dtype, options: Options) -> str:
    """The spec to run where gradients will be wanted: it returns lse if a C++ kernel may compute them from it."""
    if not _enabled(dtype, options):
        return text
    try:
        find_compiler(options)
    except CompileError:
        return text
    return with_lse(text)


def _enabled(dtype: torch.dtype, options: Options) -> bool:
    return dtype != torch.float64 and options.kernel in ("auto", "cpp") and not options.disable


@dataclass
class Gradients:
    """The kernel of one spec, layout and set of learned captures.

    `refused` is why there is none for such a spec; `problem` why the one that there is may not be used.
    """

    spec: AttentionSpec
    layout: Layout
    learned: tuple[str, ...]
    options: Options
    warn: Warn
    problem: str = ""
    refused: str = ""
    library: Library | None = None
    checked: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.refused = undifferentiable(self.spec, self.layout, self.learned) or ""
        self.by_data = by_data(self.spec)
        self.places = {
            3 + i: torch.float64 if sum_type(self.spec, c.name) == "double" else torch.float32
            for i, c in enumerate(self.spec.captures)
            if c.name in self.learned
        }
        if self.refused:
            log.info("gradients of %s are computed by the reference: %s", self.spec, self.refused)
            return
        kernel = emit_backward(self.spec, self.layout, backward_plan(vector_lanes()), self.learned)
        dump.kernel(self.options.dump, f"{self.spec.key[:16]}_{kernel.key[:8]}.cpp", kernel.source)
        try:
            self.library = build_kernel(kernel, self.options, self.warn, self.spec.text, "backward")
        except AttnoptError as error:
            self.problem = str(error)

    def run(
        self, grad: Tensor, dlse: Tensor | None, tensors: Sequence[Tensor], scalars: Sequence[int], saved: Saved
    ) -> dict[int, Tensor]:
        """Gradients of q, k, v and the learned captures by their place among the tensors. Raises `CompileError`."""
        q, k, v, *captures = tensors
        out, lse = saved
        results = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        tables = [torch.zeros(tensors[place].shape, dtype=kind) for place, kind in self.places.items()]
        numbers = [q.shape[0], q.shape[2], k.shape[2]]
        for t in (q, k, v, grad if out is None else out, grad, *captures):
            numbers += t.stride()
        numbers += scalars[: len(self.spec.scalars)]
        for t in tables:
            numbers += [*t.stride(), t.numel()]
        dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
        given = (*tensors, out, grad, lse, dlse, *results, *tables)
        pointers = [None if t is None else t.data_ptr() for t in given]
        assert self.library is not None
        status = self.library.run(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_int64 * len(numbers))(*numbers),
            torch.get_num_threads(),
        )
        if status:
            raise CompileError("the kernel ran out of memory" if status == 1 else f"the kernel refused with {status}")
        return {**dict(enumerate(results)), **dict(zip(self.places, tables, strict=True))}

    def trusted(
        self,
        grad: Tensor,
        dlse: Tensor | None,
        tensors: Sequence[Tensor],
        scalars: Sequence[int],
        needs: Sequence[bool],
    ) -> str:
        """Why the kernel may not be used on these inputs; empty if it may."""
        q, k, _, *captures = tensors
        sizes = (q.shape[0], q.shape[2], k.shape[2], *[t.shape for t in captures], *scalars)
        if sizes in self.checked:
            return (outside(self.spec, q, k, captures, scalars, True) or "") if self.by_data else ""
        problem = outside(self.spec, q, k, captures, scalars)
        if problem:
            return problem
        kind = tuple((min(n, _SAMPLE).bit_length(), n % 8 == 0) for n in (q.shape[2], k.shape[2]))
        if self.options.first_use_check and kind not in self.checked:
            problem = self.problem = self._disagrees(grad, dlse, tensors, scalars, needs)
            if not problem:
                self.checked.add(kind)
        if not problem:
            self.checked.add(sizes)
        return problem or ""

    def _disagrees(
        self,
        grad: Tensor,
        dlse: Tensor | None,
        tensors: Sequence[Tensor],
        scalars: Sequence[int],
        needs: Sequence[bool],
    ) -> str:
        """Judged on some queries and keys."""
        few, *grads = sample(self.spec, grad, dlse, tensors, scalars, _SAMPLE)
        captures = few[3:]
        saved: Saved = (None, None)
        if isinstance(self.spec.normalizer, Softmax):
            out, lse = reference(self.spec, *few[:3], captures, scalars)
            saved = out, lse.contiguous()
        found = self.run(*grads, few, scalars, saved)
        return objection(self.spec, *grads, few, scalars, needs, found)


def sample(
    spec: AttentionSpec,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    count: int,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Tensors and gradients to judge kernels by: the first `count` queries and keys of the first entries.

    All of them where loads of so few would leave their tensors.
    """
    q, k, v, *captures = tensors
    rows = min(q.shape[2], count)
    few = [q[:2, :, :rows], k[:2, :, :count], v[:2, :, :count], *captures]
    if outside(spec, few[0], few[1], captures, scalars):
        few, rows = list(tensors), q.shape[2]
    some = slice(few[0].shape[0]), slice(None), slice(rows)
    return few, telling(grad[some]), None if dlse is None else telling(dlse[some]).contiguous()


def objection(
    spec: AttentionSpec,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    found: Mapping[int, Tensor],
) -> str:
    """Which of the gradients `found`, by place among the tensors, is less right than eager's; empty if none is."""
    q = tensors[0]
    places = [place for place, needed in enumerate(needs) if needed]
    golden, eager = (expected(spec, grad, dlse, tensors, scalars, needs, x) for x in (torch.float64, q.dtype))
    nudged: list[list[Tensor]] = []
    for i, place in enumerate(places):
        mine = found[place].to(tensors[place].dtype)
        verdict = compare(golden[i], eager[i], mine, gradients=True)
        if not verdict.ok and not nudged:
            moved = (_moved(grad, tensors, seed) for seed in range(3))
            nudged = [expected(spec, g, dlse, x, scalars, needs, torch.float64) for g, x in moved]
        if not verdict.ok:
            verdict = compare(golden[i], eager[i], mine, gradients=True, nudged=[run[i] for run in nudged])
        if not verdict.ok:
            name = ("q", "k", "v", *(c.name for c in spec.captures))[place]
            return f"the gradient of {name} disagrees with the reference ({verdict})"
    return ""


def _moved(grad: Tensor, tensors: Sequence[Tensor], seed: int) -> tuple[Tensor, list[Tensor]]:
    """Inputs a few roundings away: where the mathematics itself is sensitive they show how much.

    Summing d products in sequence errs like inputs that are off by sqrt(d/2) roundings, here at two sigma: q and k
    for the scores, v and the gradient of the result for those of the weights.
    """
    q, k, v, *rest = tensors
    size, width = (2.0 * (1.0 + (t.shape[3] / 2) ** 0.5) for t in (q, v))
    moved = [nudge(t, x, 4 * seed + i) for i, (t, x) in enumerate(((q, size), (k, size), (v, width), (grad, width)))]
    return moved[3], [*moved[:3], *rest]


_KNOWN: dict[Any, Gradients] = {}
_LOCK = threading.RLock()


def gradients(
    spec: AttentionSpec,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    saved: Saved,
    options: Options,
    warn: Warn,
) -> list[Tensor] | None:
    """Gradients of the tensors (q, k, v, captures...) that `needs` marks, contiguous and in their dtypes.

    `saved` are the result and lse, None for a normaliser that needs neither. The answer is None where another way is
    the better one or the spec has no kernel, and, after a warning, where one fails or disagrees with the reference.
    """
    q, k, _, *captures = tensors
    if not _enabled(q.dtype, options) or not any(needs) or spec.dropout or 0 in (*q.shape, k.shape[2]):
        return None
    if linear.chosen(spec, q, k) is not None or isinstance(spec.normalizer, Mixed):
        return None
    if isinstance(spec.normalizer, Softmax) and (saved[1] is None or not saved[1].numel()):
        return None
    try:
        kernel = _kernel(spec, q, captures, needs, options, warn)
        if kernel.refused:
            return None
        with torch.no_grad():
            problem = kernel.problem or kernel.trusted(grad, dlse, tensors, scalars, needs)
            if not problem:
                found = kernel.run(grad, dlse, tensors, scalars, saved)
                return [found[i].to(t.dtype) for i, t in enumerate(tensors) if needs[i]]
    except AttnoptError as error:
        problem = str(error)
    warn(f"no C++ kernel for these gradients: {problem.rstrip('.')}. They are computed as in eager PyTorch.")
    return None


def _kernel(
    spec: AttentionSpec, q: Tensor, captures: Sequence[Tensor], needs: Sequence[bool], options: Options, warn: Warn
) -> Gradients:
    learned = tuple(c.name for c, needed in zip(spec.captures, needs[3:], strict=True) if needed)
    layout = layout_of(_axes(spec), q, captures)
    key = (spec.key, layout, learned, options)
    with _LOCK:
        if key not in _KNOWN:
            _KNOWN[key] = Gradients(spec, layout, learned, options, warn)
        return _KNOWN[key]


@functools.lru_cache(maxsize=4096)
def _axes(spec: AttentionSpec) -> tuple[int | None, ...]:
    return k_axes(spec)
