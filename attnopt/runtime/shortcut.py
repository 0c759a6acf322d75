"""The operator's entry for plain tensors: a call that records nothing skips the layers that would.

`torch.library.register_autograd` costs every call some 20 microseconds, which is more than a small attention itself.
It knows neither forward-mode derivatives nor the transforms of `torch.func`: under those the operator is what it means,
in operators that have rules for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Somebody traces, or the tensors are not what they seem: a negated view has the memory of what is negated.
_UNPLAIN = tuple(getattr(torch._C.DispatchKey, name) for name in ("Python", "Negative", "ZeroTensor"))
Kernel = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Any, ...]]
Text = Callable[[str, Tensor], str]


def register_shortcut(
    library: torch.library.Library,
    forward: Any,
    kernel: Kernel,
    backward: Backward,
    plain: Kernel,
    recorded_text: Text,
) -> None:
    """Make it what runs for the autograd keys of the CPU and of GPUs.

    Args:
        library: where the operator was defined.
        forward: the operator.
        kernel: what it runs on such tensors.
        backward: `backward(ctx, grad_out, grad_lse)` gives the gradients of q, k, v, of the list of captures, and of
            scalars and spec; `ctx.kept` are the result and lse, or two times None.
        plain: the same in operators of PyTorch.
        recorded_text: from a spec and q to the spec to run where gradients will be wanted, which may return lse.
    """
    recorded = _recorded(forward, backward, recorded_text)

    def attention(
        keys: Any, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: list[int], spec: str
    ) -> tuple[Tensor, Tensor]:
        if transformed():
            return plain(q, k, v, captures, scalars, spec)
        needed = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or any(t.requires_grad for t in captures)
        )
        if needed:
            found: tuple[Tensor, Tensor] = recorded.apply(q, k, v, scalars, spec, *captures)
            return found
        if any(map(keys.has, _UNPLAIN)):
            with torch._C._AutoDispatchBelowAutograd():
                return forward(q, k, v, captures, scalars, spec)  # type: ignore[no-any-return]
        return kernel(q, k, v, captures, scalars, spec)

    for key in ("AutogradCPU", "AutogradCUDA"):
        library.impl("attention", attention, key, with_keyset=True)


def transformed() -> bool:
    """Whether derivatives are taken forward, or by a transform of `torch.func`."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _recorded(forward: Any, backward: Backward, recorded_text: Text) -> Any:
    class Recorded(torch.autograd.Function):
        """The operator below the autograd keys, and its gradients."""

        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, scalars: list[int], spec: str, *captures: Tensor
        ) -> tuple[Tensor, Tensor]:
            text = recorded_text(spec, q)
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = forward(q, k, v, list(captures), list(scalars), text)
            kept = (out, lse) if lse.dim() >= 3 else ()
            ctx.save_for_backward(q, k, v, *captures, *kept)
            ctx.scalars, ctx.spec, ctx.needs, ctx.captures = scalars, spec, ctx.needs_input_grad, len(captures)
            return out, lse if text == spec else lse.new_empty(0)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
            needs, count, saved = ctx.needs, 3 + ctx.captures, ctx.saved_tensors
            context = _Context(saved[:count], ctx.scalars, ctx.spec, (*needs[:3], list(needs[5:])))
            context.kept = saved[count:] or (None, None)
            q, k, v, captures, _, _ = backward(context, grad_out, grad_lse)
            return (q, k, v, None, None, *captures)

    return Recorded


class _Context:
    """What the operator's own gradient formula reads."""

    def __init__(self, saved: tuple[Tensor, ...], scalars: list[int], spec: str, needs: tuple[Any, ...]) -> None:
        self.saved_tensors, self.scalars, self.spec, self.needs_input_grad = saved, scalars, spec, needs
        self.kept: tuple[Tensor | None, ...] = (None, None)
