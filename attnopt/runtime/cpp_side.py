"""Column mass and weights by generated C++ kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt import dump
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_plans import backward_plan
from attnopt.codegen.cpp_side import emit_side, supported_side
from attnopt.errors import AttnoptError, CompileError
from attnopt.options import Options
from attnopt.runtime.build import build_kernel
from attnopt.runtime.compile import Library, vector_lanes
from attnopt.spec import AttentionSpec


class CppSide:
    """The kernel of one spec and layout; `problem` is why there is none."""

    def __init__(self, spec: AttentionSpec, layout: Layout, options: Options, warn: Callable[[str], None]) -> None:
        self.spec, self.problem = spec, supported_side(spec, layout) or ""
        self.library: Library | None = None
        if self.problem:
            return
        kernel = emit_side(spec, layout, backward_plan(vector_lanes()))
        dump.kernel(options.dump, f"{spec.key[:16]}_{kernel.key[:8]}.cpp", kernel.source)
        try:
            self.library = build_kernel(kernel, options, warn, spec.text, "side")
        except AttnoptError as error:
            self.problem = str(error)

    def __call__(
        self, q: Tensor, k: Tensor, rows: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str
    ) -> Tensor:
        """As the operator, but that rows without keys have not been added to a column. Raises `CompileError`."""
        assert self.library is not None
        weights, (batch, heads, n_q, _), n_k = name == "weights", q.shape, k.shape[2]
        shape = (batch, heads, n_q, n_k) if weights else (batch, heads, n_k)
        made = torch.empty(shape, dtype=q.dtype if weights else torch.float32)
        numbers = [batch, n_q, n_k, *q.stride(), *k.stride(), *(x for t in captures for x in t.stride())]
        numbers += scalars[: len(self.spec.scalars)]
        pointers = [t.data_ptr() for t in (q, k, *captures)] + [rows.data_ptr() if rows.numel() else None]
        status = self.library.run(
            (ctypes.c_void_p * len(pointers))(*pointers),
            made.data_ptr(),
            (ctypes.c_int64 * len(numbers))(*numbers),
            int(weights),
            torch.get_num_threads(),
        )
        if status:
            raise CompileError("the kernel ran out of memory" if status == 1 else f"the kernel refused with {status}")
        return made
