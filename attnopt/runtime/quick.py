"""Calls that were made before, of an attention that reads nothing but q, k and v: one look-up, then the kernel.

A small attention takes less time than it takes Python to ask what there is to know about three tensors, so all of it is
remembered by their dtypes, sizes and strides at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.errors import CompileError
from attnopt.runtime import dispatch
from attnopt.runtime.native import Native

_CALLS_KEPT = 4096
# The lse of a spec that returns none; nobody records it. On the CPU wherever new tensors are made during the import.
with torch.inference_mode(False):
    _NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


def quick(q: Tensor, k: Tensor, v: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """`dispatch.forward` of the spec `text` for tensors that are `direct`, without captures and scalars."""
    active = dispatch.current()
    site = active.site(text)
    call = (q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride())
    found = site.calls.get(call)
    if found is not None:
        try:
            out, lse = found[0].launch(q, k, v, (), found[1])
            return out, _NOTHING if lse is None else lse
        except CompileError:
            pass  # the way of a first call says so, once
    result = active.run(q, k, v, (), (), text)
    backend = site.shapes.get(active.shape(site, q, k, v, (), ()))
    numbers = backend.numbers_of(q, k, v) if isinstance(backend, Native) else None
    if numbers is not None and len(site.calls) < _CALLS_KEPT:
        site.calls[call] = backend, numbers
    return result
