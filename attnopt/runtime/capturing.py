"""Whether a CUDA graph is being recorded: then the host may read nothing, so nothing is compared or measured."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import CompileError


def capturing() -> bool:
    """Whether the current CUDA stream is recorded into a graph. Starts no driver."""
    with contextlib.suppress(RuntimeError, AttributeError):
        return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())
    return False


def recorded(tensor: Tensor) -> bool:
    """Whether a call on this tensor is being recorded."""
    return tensor.is_cuda and capturing()


def refuse(tensor: Tensor, known: bool, by_data: bool, captures: Sequence[Tensor]) -> None:
    """Raise `CompileError` if this call is recorded and cannot be: what it loads is checked by the host first.

    Args:
        tensor: where the call runs.
        known: whether these shapes ran before.
        by_data: whether an index depends on a tensor's content.
        captures: the captured tensors.
    """
    if not recorded(tensor):
        return
    if by_data:
        raise CompileError(
            "an attention whose loads are indexed by data was called while a CUDA graph is captured; their bounds are "
            "read by the host at every call. Leave this module out of the graph."
        )
    if captures and not known:
        raise CompileError(
            "an attention was called at new shapes while a CUDA graph is captured; its loads are checked by the host "
            "at the first call. Call it once with these shapes before the capture."
        )
