"""Kernels compiled with g++ directly, and a dense fp64 evaluation to compare them with."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.codegen import cpp
from attnopt.codegen.base import CaptureLayout, Kernel, Layout, Plan
from attnopt.runtime.validate import nudge
from attnopt.spec import AttentionSpec, EmptyRow, Pointwise, Softmax

_FOLDER = tempfile.TemporaryDirectory(prefix="attnopt-tests-")


@functools.cache
def compiled(source: str, key: str) -> ctypes.CDLL:
    """The loaded library of a kernel's text."""
    path = Path(_FOLDER.name, f"{key[:16]}.cpp")
    path.write_text(source)
    library = path.with_suffix(".so")
    # Sanitizers come in here: `make sanitize`.
    extra = os.environ.get("ATTNOPT_TEST_CXXFLAGS", "").split()
    subprocess.run(["g++", *cpp.FLAGS, *extra, str(path), "-o", str(library)], check=True, timeout=60)
    return ctypes.CDLL(str(library))


def layout_of(spec: AttentionSpec, dtype: torch.dtype, captures: Sequence[Tensor]) -> Layout:
    """What a call with these tensors is specialised for."""
    parts = []
    for tensor, axis in zip(captures, cpp.k_axes(spec), strict=True):
        stride = None if axis is None or tensor.stride(axis) not in (0, 1) else tensor.stride(axis)
        parts.append(CaptureLayout(str(tensor.dtype).removeprefix("torch."), stride))
    return Layout(str(dtype).removeprefix("torch."), tuple(parts))


def call(
    kernel: Kernel,
    tensors: Sequence[Tensor],
    out: Tensor,
    lse: Tensor | None = None,
    scalars: Sequence[int] = (),
    threads: int = 2,
) -> int:
    """Runs a kernel on q, k, v and captures; returns its code."""
    q, k = tensors[0], tensors[1]
    meta = [q.shape[0], q.shape[2], k.shape[2]]
    for tensor in (*tensors[:3], out, *tensors[3:]):
        meta += tensor.stride()
    meta += scalars
    pointers = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    forward = compiled(kernel.source, kernel.key).attnopt_forward
    return int(
        forward(
            pointers,
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(None if lse is None else lse.data_ptr()),
            (ctypes.c_int64 * len(meta))(*meta),
            ctypes.c_int32(threads),
        )
    )


def run(
    spec: AttentionSpec,
    tensors: Sequence[Tensor],
    scalars: Sequence[int] = (),
    plan: Plan | None = None,
    threads: int = 2,
) -> tuple[Tensor, Tensor]:
    """Output and lse of the generated kernel; both are poisoned before."""
    q = tensors[0]
    kernel = cpp.emit(spec, layout_of(spec, q.dtype, tensors[3:]), plan)
    out = torch.full((*q.shape[:3], spec.heads.d_v), 12345.0, dtype=q.dtype)
    lse = torch.full(q.shape[:3], 12345.0)
    assert call(kernel, tensors, out, lse, scalars, threads) == 0
    return out, lse


def dense(
    spec: AttentionSpec, tensors: Sequence[Tensor], scalars: Sequence[int] = (), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The spec evaluated as written, with the whole matrix of scores."""
    q, k, v = (t.to(dtype) for t in tensors[:3])
    k, v = k[:, list(spec.heads.k_map)], v[:, list(spec.heads.v_map)]
    s = q @ k.transpose(-1, -2)
    spans = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(s.shape)]
    names = dict(zip(ex.COORDINATES, spans, strict=True)) | dict(zip(ex.SIZES, s.shape, strict=True))
    names |= {ex.scalar(n): x for n, x in zip(spec.scalars, scalars, strict=True)} | {ex.s: s}
    held = {c.name: t for c, t in zip(spec.captures, tensors[3:], strict=True)}

    def value(expr: sp.Basic) -> Tensor:
        return _value(expr, names, held, dtype)

    if isinstance(spec.normalizer, Pointwise):
        kept = torch.where(value(spec.keep).bool(), value(spec.score).to(dtype).expand(s.shape), 0.0)
        names |= {ex.t: kept.sum(-1, keepdim=True), ex.a: kept.abs().sum(-1, keepdim=True)}
        divide = value(spec.normalizer.divide).to(dtype).expand(*s.shape[:3], 1)
        return (kept * value(spec.weight) / divide) @ v * value(spec.gate), divide[..., 0].abs().log()
    logits = value(spec.score).to(dtype).expand(s.shape)
    logits = torch.where(value(spec.keep).bool(), logits, -torch.inf)
    parts = [logits]
    if spec.normalizer.sink is not None:
        parts.append(value(spec.normalizer.sink).to(dtype).expand(*s.shape[:3], 1))
    joined = torch.cat(parts, -1)
    lse = torch.logsumexp(joined, -1)
    empty = (lse == -torch.inf)[..., None]
    out = (torch.where(empty, 0.0, torch.softmax(joined, -1)[..., : s.shape[3]]) * value(spec.weight)) @ v
    filler = {EmptyRow.ZERO: torch.zeros(()), EmptyRow.NAN: torch.tensor(torch.nan)}.get(spec.empty_row)
    if k.shape[2]:
        out = torch.where(empty, v.mean(2, keepdim=True) if filler is None else filler.to(dtype), out)
    computed = value(spec.rows).bool().expand(*s.shape[:3], 1)
    return (out * value(spec.gate)).where(computed, 0.0), lse.where(computed[..., 0], -torch.inf)


def _value(expr: sp.Basic, names: dict[sp.Symbol, object], held: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    def visit(e: sp.Basic) -> Tensor:
        if isinstance(e, ex.Load):
            places = torch.broadcast_tensors(*[visit(i).long() for i in e.args[1:]])
            tensor = held[e.args[0].name]
            inside = [p.clamp(0, max(n - 1, 0)) for p, n in zip(places, tensor.shape, strict=True)]
            loaded = tensor[tuple(inside)]
            return loaded.long() if isinstance(e, ex.IntLoad) else loaded.to(dtype)
        if e in names:
            return torch.as_tensor(names[e])
        if e.is_number or e in (sp.true, sp.false):
            whole = e.is_Integer and abs(e) < 2**63
            return (
                torch.tensor(bool(e))
                if e in (sp.true, sp.false)
                else torch.tensor(int(e) if whole else float(e), dtype=torch.long if whole else dtype)
            )
        function = _FUNCTIONS.get("exp" if isinstance(e, sp.exp) else e.func.__name__) or getattr(
            torch, e.func.__name__
        )
        args = [visit(a) for a in e.args]
        return functools.reduce(function, args) if len(args) > 2 and not isinstance(e, ex.Where) else function(*args)

    return visit(expr)


_FUNCTIONS = {
    "Add": torch.add,
    "Mul": torch.mul,
    "Pow": lambda x, y: torch.pow(x.double(), y),
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Not": torch.logical_not,
    "GreaterThan": torch.ge,
    "StrictGreaterThan": torch.gt,
    "LessThan": torch.le,
    "StrictLessThan": torch.lt,
    "Equality": torch.eq,
    "Unequality": torch.ne,
    "FloorDiv": torch.floor_divide,
    "Mod": torch.remainder,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Where": lambda c, x, y: torch.where(c, x, y),
    "Trunc": lambda x: x.trunc().long(),
    "Snap": lambda x, unit: torch.round(x / unit) * unit,
    "floor": lambda x: x.floor().long(),
    "Abs": torch.abs,
}


def tolerance(spec: AttentionSpec, tensors: Sequence[Tensor], scalars: Sequence[int] = ()) -> tuple[float, float]:
    """Greatest error of the same mathematics in fp32 and one rounding to the output's dtype: `(out, lse)`.

    Two orders of summation may differ by a few times what one of them errs, hence the factor; the second term is
    the error of n fp32 roundings where eager happens to be exact.
    """
    exact, eager = dense(spec, tensors, scalars), dense(spec, tensors, scalars, torch.float32)
    eps = torch.finfo(torch.float32).eps
    size = exact[0].nan_to_num().abs().amax().item() if exact[0].numel() else 1.0
    errs = [
        (e.double() - x).nan_to_num().abs().amax().item() if x.numel() else 0.0
        for e, x in zip(eager, exact, strict=True)
    ]
    if not isinstance(spec.normalizer, Softmax):
        # Weights of both signs may cancel in the sum that a row is divided by: there the mathematics itself is as
        # sensitive as inputs a few roundings away show.
        size_of_nudge = 2.0 * (1.0 + math.sqrt(tensors[0].shape[3] / 2))
        for seed in range(3):
            moved = [nudge(tensors[0], size_of_nudge, 2 * seed), nudge(tensors[1], size_of_nudge, 2 * seed + 1)]
            near = dense(spec, [*moved, *tensors[2:]], scalars)
            errs = [
                max(e, (n - x).nan_to_num().abs().amax().item() if x.numel() else 0.0)
                for e, n, x in zip(errs, near, exact, strict=True)
            ]
    top = exact[1].nan_to_num(neginf=0).abs().amax().item() if exact[1].numel() else 1.0
    rounding = torch.finfo(tensors[0].dtype).eps / 2 * size if tensors[0].dtype != torch.float32 else 0.0
    floor = eps * math.sqrt(tensors[1].shape[2] + tensors[1].shape[3])
    return 4 * errs[0] + floor * size + rounding * 1.01, 4 * errs[1] + floor * (1 + top)


def agree(
    spec: AttentionSpec,
    tensors: Sequence[Tensor],
    scalars: Sequence[int] = (),
    plan: Plan | None = None,
    threads: int = 2,
) -> None:
    """Asserts that the kernel and the dense fp64 evaluation give one result, NaN for NaN."""
    out, lse = run(spec, tensors, scalars, plan, threads)
    exact, exact_lse = dense(spec, tensors, scalars)
    bound, lse_bound = tolerance(spec, tensors, scalars)
    close(out.double(), exact.expand(out.shape), bound)
    if "lse" in spec.returns:
        close(lse.double(), exact_lse, lse_bound)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Asserts equal NaNs, equal infinities and a difference within the bound elsewhere."""
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    special = ~finite & ~expected.isnan()
    assert torch.equal(actual[special], expected[special])
    worst = (actual - expected)[finite].abs().amax().item() if finite.any() else 0.0
    assert worst <= bound, f"error {worst:.3g}, bound {bound:.3g}"
