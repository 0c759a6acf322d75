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


def watched() -> bool:
    """Whether anybody but the caller takes an interest in operators: a compiler, a mode, a transform, a profiler."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state()
    )


def direct(tensors: Sequence[Tensor]) -> bool:
    """Whether an operator on these tensors is no more than its kernel for the CPU."""
    if watched():
        return False
    records = torch.is_grad_enabled()
    for t in tensors:
        if type(t) not in _PLAIN or not t.is_cpu or t.layout is not torch.strided or (records and t.requires_grad):
            return False
        if t.is_neg() or t._is_zerotensor():  # views that the dispatcher would compute first
            return False
    return True
