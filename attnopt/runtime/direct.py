"""Whether a call of the operator may go straight to its kernel.

PyTorch's dispatcher takes some 16 microseconds for an operator that is written in Python, as long as a small attention.
It has nothing to do where nobody records, traces, transforms or converts, and every tensor is what it seems.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
# Found once: looking a name up in a module takes as long as such a question.
_compiles, _modes, _functions = (
    torch.compiler.is_compiling,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
)
_transforms, _autocasts, _traces = (
    torch._C._are_functorch_transforms_active,
    torch.is_autocast_enabled,
    torch._C._get_tracing_state,
)
_autograd, _records, _strided = torch._C._autograd, torch.is_grad_enabled, torch.strided


def watched() -> bool:
    """Whether anybody but the caller takes an interest in operators: a compiler, a mode, a transform, a profiler."""
    return bool(
        _compiles()
        or _modes()
        or _functions()
        or forward_ad._current_level >= 0
        or _transforms()
        or _autocasts("cpu")
        or _autograd._profiler_enabled()
        or _traces()
    )


def direct(tensors: Sequence[Tensor]) -> bool:
    """Whether an operator on these tensors is no more than its kernel for the CPU."""
    if watched():
        return False
    records = _records()
    for t in tensors:
        if type(t) not in _PLAIN or not t.is_cpu or t.layout is not _strided or (records and t.requires_grad):
            return False
        if t.is_neg() or t._is_zerotensor():  # views that the dispatcher would compute first
            return False
    return True
