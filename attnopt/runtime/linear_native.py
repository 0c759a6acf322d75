"""The generated C++ kernel of a linear attention as a backend: what varies by key, query or head goes in as tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.linear_form import LinearForm, linear_form
from attnopt.analysis.mixed_form import mixed_form
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_linear import emit_linear, supported_linear
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime import linear, triton_linear
from attnopt.runtime.build import Warn, build_kernel
from attnopt.runtime.capturing import recorded
from attnopt.runtime.compile import Library, vector_lanes
from attnopt.runtime.inputs import dtype_name
from attnopt.runtime.linear_factors import Factors, factors
from attnopt.runtime.mixed import Parts, Run
from attnopt.runtime.native import check_rows
from attnopt.runtime.site import Site
from attnopt.runtime.triton_launch import runs_on
from attnopt.spec import AttentionSpec

_POINTERS = ctypes.c_void_p * 9
_NUMBERS = ctypes.c_int64 * 38


class NativeLinear:
    """Runs a loaded kernel; `name` is what the report calls it."""

    name = "cpp linear"

    def __init__(self, spec: AttentionSpec, form: LinearForm, library: Library) -> None:
        self.spec, self.form, self.library = spec, form, library

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], total: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The attention, and with `total` the sum of each row's weights `[B, H, n_q]` in fp32."""
        made = factors(self.spec, self.form, q, k, captures, scalars)
        batch, heads, rows, width = (*q.shape[:3], v.shape[3])
        out = torch.empty_strided(
            (batch, heads, rows, width), (rows * heads * width, width, heads * width, 1), dtype=q.dtype
        )
        sums = torch.empty((batch, heads, rows)) if total else None
        launch(self.library, (q, k, v), made, out, sums)
        return out, sums


def launch(
    library: Library, tensors: tuple[Tensor, Tensor, Tensor], made: Factors, out: Tensor, total: Tensor | None = None,
    reverse: bool = False, ahead: int = 0,
) -> None:  # fmt: skip
    """Run a kernel of linear attention into `out [B, H, n_q, d_v]` and `total [B, H, n_q]`. Raises `CompileError`.

    `reverse` goes through all positions from the last to the first; then there may be no `total`. Where weights decay,
    the query at place i counts as one at place i + `ahead`.
    """
    q, k, _ = tensors
    along = (*tensors, out), (made.by_key, made.by_query, made.gate), made.line or (None, None)
    numbers = [q.shape[0], q.shape[2], k.shape[2], made.offset, ahead]
    pointers: list[int | None] = []
    for count, some in zip((4, 3, 3), along, strict=True):
        for tensor in some:
            strides = _strides(tensor, count)
            last = strides[2] * (tensor.shape[2] - 1) * tensor.element_size() if reverse and tensor is not None else 0
            pointers.append(None if tensor is None else tensor.data_ptr() + last)
            numbers += [*strides[:2], -strides[2] if reverse else strides[2], *strides[3:]]
        if count == 3 and len(pointers) == 7:  # behind the factors
            pointers.append(None if made.rate is None else made.rate.data_ptr())
            numbers += _strides(made.rate, 2)
    place = pointers.pop(3)
    status = library.run(
        _POINTERS(*pointers), place, None if total is None else total.data_ptr(), _NUMBERS(*numbers),
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        raise CompileError("the kernel ran out of memory" if status == 1 else f"the kernel refused with {status}")


def candidates(
    spec: AttentionSpec, q: Tensor, k: Tensor, options: Options, warn: Warn, run: Run, kept: dict[Any, Any]
) -> Iterator[Any]:
    """Backends of linear cost for these inputs, the best first. `kept` remembers kernels by dtype and device."""
    form, parts = linear_form(spec), mixed_form(spec)
    if options.disable or options.kernel == "reference":
        return
    far = spec if form is not None else parts.far if parts is not None else None
    gpu = runs_on(q.device, options)
    enabled = options.kernel == "auto" or gpu
    if far is None or (parts is None and (not enabled or linear.chosen(spec, q, k) is None)):
        return
    key = _key(q)
    if key not in kept and gpu:
        kept[key] = triton_linear.build(far, form or parts.linear, q, options, warn)  # type: ignore[union-attr]
    elif key not in kept and options.kernel in ("auto", "cpp"):
        kept[key] = build_linear(far, form or parts.linear, q, options, warn)  # type: ignore[union-attr]
    native = kept.get(key)
    if parts is not None:
        yield from (Parts(spec, parts, run, one) for one in ((native, None) if native is not None else (None,)))
        return
    if native is not None:
        yield native
    yield linear.chosen(spec, q, k)


def tried(
    site: Site, inputs: tuple[Tensor, Tensor, Tensor], captures: Sequence[Tensor], scalars: Sequence[int],
    options: Options, warn: Warn, run: Run,
) -> tuple[Any, tuple[Tensor, None]] | None:  # fmt: skip
    """The first backend of linear cost whose result here is as right as eager PyTorch, with it; None if there is none.

    Sampled rows are compared with the definition in fp64, as for every other kernel. A compiled kernel that is wrong
    or fails is switched off for the site; torch's operators take its place, and the definition takes theirs.
    """
    q, k, _ = inputs
    key = _key(q)
    for backend in candidates(site.spec, q, k, options, warn, run, site.backends):
        compiled = not isinstance(backend, linear.Linear) and getattr(backend, "native", backend) is not None
        try:
            result = backend(*inputs, captures, scalars)
            if recorded(q) or not options.first_use_check:
                return backend, result
            verdict = check_rows(site.spec, inputs, captures, scalars, *result)
            if verdict.ok:
                return backend, result
            problem = f"disagrees with the reference ({verdict})"
        except CompileError as error:
            problem = f"failed ({error})"
        what = "the kernel" if compiled else "the linear form"
        site.reason = f"{what} {problem}"
        if compiled:
            site.backends[key] = None
        warn(
            f"{what} of {site.spec} {problem} and is {'switched off' if compiled else 'not used at these sizes'}; "
            f"{'the same in torch operators' if compiled else 'attention at quadratic cost'} runs instead. Please "
            "report this with the spec's text."
        )
    return None


def _key(q: Tensor) -> tuple[str, torch.dtype, str]:
    return "linear", q.dtype, q.device.type


def build_linear(spec: AttentionSpec, form: LinearForm, q: Tensor, options: Options, warn: Warn) -> NativeLinear | None:
    """The kernel for these inputs; None where there is none, or none that can be compiled here."""
    layout = Layout(dtype_name(q.dtype))
    if q.device.type != "cpu" or supported_linear(spec, layout) is not None:
        return None
    try:
        kernel = emit_linear(spec, form, layout, vector_lanes())
        return NativeLinear(spec, form, build_kernel(kernel, options, warn, spec.text))
    except AttnoptError as error:
        warn(f"no compiled kernel of a linear attention: {str(error).rstrip('.')}. Torch's operators run instead.")
        return None


def _strides(tensor: Tensor | None, count: int) -> list[int]:
    """Strides in elements, zero along what is broadcast."""
    if tensor is None:
        return [0] * count
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
