"""Gradients of linear and mixed attentions by Triton kernels; None where there are none, and another way takes over.

The kernels differentiate the sums of values and of weights. What follows those, the division by a row's sum, gates and
the joining with a softmax window, is little work for each result, and `torch.autograd` does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.linear_form import LinearForm, linear_form
from attnopt.analysis.mixed_form import LEAST, MixedForm, mixed_form
from attnopt.errors import AttnoptError
from attnopt.expr import load_names
from attnopt.options import Options
from attnopt.runtime import linear, mixed
from attnopt.runtime.capturing import capturing
from attnopt.runtime.gradient import expected, recording, telling
from attnopt.runtime.triton_linear import TritonLinear, build
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec

# Queries and keys of the problem on which kernels are compared with the reference before their first use.
_SAMPLE = 160


@dataclass
class Gradients:
    """The kernels of one spec, dtype and kind of device; `problem` is why they may not be used."""

    spec: AttentionSpec
    backend: TritonLinear
    mixed: MixedForm | None
    problem: str = ""
    checked: set[tuple[bool, ...]] = field(default_factory=set)

    def run(self, grad: Tensor, tensors: Sequence[Tensor], scalars: Sequence[int], needs: Sequence[bool]) -> list[Any]:
        """The gradients that `needs` marks. Raises `CompileError`."""
        leaves = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs, strict=True)]
        with recording(tensors[0].device.type):
            out = self._out(leaves, scalars)
            wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
            return list(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True, materialize_grads=True))

    def _out(self, leaves: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        q, k, v, *captures = leaves
        fixed = [t.detach() for t in captures]
        scope = linear.scope_of(self.spec, q, k, captures, scalars)
        if self.mixed is None:
            made = self.backend.factors(q, k, fixed, scalars)
            found, total = self.backend.sums(q, k, v, scalars, made)
            return linear.finished(self.spec, scope, found, total.unsqueeze(-1))
        width, form = self.mixed.width, self.mixed
        near, lse = torch.ops.attnopt.attention.default(
            q[..., :width], k[..., :width], v, captures, list(scalars), form.near.text
        )
        made = self.backend.factors(q[..., width:], k[..., width:], fixed, scalars)
        found, total = self.backend.sums(q[..., width:], k[..., width:], v, scalars, made)
        total = total.unsqueeze(-1)
        out = mixed._joined(near.float(), lse.unsqueeze(-1), found / total.clamp_min(LEAST), total)
        return mixed._gated(self.spec, scope, out)


_KNOWN: dict[Any, Gradients | None] = {}
_LOCK = threading.Lock()


def applies(spec: AttentionSpec, q: Tensor, k: Tensor) -> bool:
    """Whether the forward of this spec has a linear part at these lengths."""
    return linear.chosen(spec, q, k) is not None or mixed_form(spec) is not None


def gradients(
    spec: AttentionSpec,
    grad: Tensor,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    warn: Callable[[str], None],
    options: Options,
) -> list[Tensor] | None:
    """Gradients of the tensors (q, k, v, captures...) that `needs` marks, contiguous and in their dtypes.

    None, and a warning with the reason, where the kernels do not exist, do not run here or disagree with the
    reference on a small part of the inputs.
    """
    q, k, _, *_ = tensors
    parts = mixed_form(spec)
    form = linear_form(spec) if parts is None else parts.linear
    if form is None or 0 in (*q.shape, k.shape[2]) or not any(needs) or q.dtype == torch.float64:
        return None
    problem = _fixed(spec, form, needs)
    try:
        kernels = None if problem else _kernels(spec, form, parts, q, options, warn)
        if kernels is None and not problem:
            return None  # it was said why
        if kernels is not None:
            problem = kernels.problem
            if not problem and tuple(needs) not in kernels.checked and options.first_use_check and not capturing():
                kernels.problem = problem = _disagrees(kernels, grad, tensors, scalars, needs)
                kernels.checked.add(tuple(needs))
            if not problem:
                found = kernels.run(grad, tensors, scalars, needs)
                wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
                return [g.to(t.dtype).contiguous() for g, t in zip(found, wanted, strict=True)]
    except AttnoptError as error:
        problem = str(error)
    problem = problem.rstrip(".")
    warn(f"no Triton kernel for the gradients of a linear attention: {problem}. Torch's operators compute them.")
    return None


def _fixed(spec: AttentionSpec, form: LinearForm, needs: Sequence[bool]) -> str:
    """Why a capture has no gradient by kernels: it is a factor of weights, or a rate; empty if none is."""
    held = load_names(form.key, form.query, form.rate)
    learned = [c.name for c, needed in zip(spec.captures, needs[3:], strict=False) if needed and c.name in held]
    return f"{', '.join(learned)} takes part in the weights" if learned else ""


def _kernels(
    spec: AttentionSpec, form: LinearForm, parts: MixedForm | None, q: Tensor, options: Options,
    warn: Callable[[str], None],
) -> Gradients | None:  # fmt: skip
    key = spec.key, q.dtype, q.device.type, options
    with _LOCK:
        if key not in _KNOWN:
            backend = build(spec if parts is None else parts.far, form, q, options, warn)
            _KNOWN[key] = None if backend is None else Gradients(spec, backend, parts)
        return _KNOWN[key]


def _disagrees(
    kernels: Gradients, grad: Tensor, tensors: Sequence[Tensor], scalars: Sequence[int], needs: Sequence[bool]
) -> str:
    """Why the kernels are not trusted, judged on the first queries and keys; empty if they are."""
    q, k, v, *captures = tensors
    rows, keys = min(q.shape[2], _SAMPLE), min(k.shape[2], _SAMPLE)
    few = [q[:, :, :rows], k[:, :, :keys], v[:, :, :keys], *captures]
    told = telling(grad[:, :, :rows])
    found = kernels.run(told, few, scalars, needs)
    golden, eager = (
        expected(kernels.spec, told, None, few, scalars, needs, work) for work in (torch.float64, q.dtype)
    )  # fmt: skip
    places = [i for i, needed in enumerate(needs) if needed]
    for place, g, e, x in zip(places, golden, eager, found, strict=True):
        verdict = compare(g, e, x.to(few[place].dtype), gradients=True)
        if not verdict.ok:
            name = ("q", "k", "v", *(c.name for c in kernels.spec.captures))[place]
            return f"the gradient of {name} disagrees with the reference ({verdict})"
    return ""
