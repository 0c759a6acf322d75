"""Gradients of linear and mixed attentions by C++ or Triton kernels; None where there are none: others take over.

The kernels differentiate the sums of values and of weights. What follows those, the division by a row's sum, gates and
the joining with a softmax window, is little work for each result, and `torch.autograd` does it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.analysis.linear_form import CHUNK, LinearForm, linear_form
from attnopt.analysis.mixed_form import LEAST, MixedForm, mixed_form
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.runtime import linear, mixed
from attnopt.runtime.capturing import capturing
from attnopt.runtime.cpp_gradient import objection
from attnopt.runtime.gradient import expected, recording, telling
from attnopt.runtime.linear_sums import NativeSums, build_sums
from attnopt.runtime.triton_launch import runs_on
from attnopt.runtime.triton_linear import TritonLinear, build
from attnopt.runtime.validate import compare
from attnopt.spec import AttentionSpec

log = logging.getLogger("attnopt")

# Queries and keys of the problem on which kernels are compared with the reference before their first use.
_SAMPLE = 160


@dataclass
class Gradients:
    """The kernels of one spec, dtype and kind of device; `problem` is why they may not be used."""

    spec: AttentionSpec
    backend: TritonLinear | NativeSums
    mixed: MixedForm | None
    problem: str = ""
    checked: set[tuple[bool, ...]] = field(default_factory=set)

    def run(self, grad: Tensor, tensors: Sequence[Tensor], scalars: Sequence[int], needs: Sequence[bool]) -> list[Any]:
        """The gradients that `needs` marks. Raises `CompileError`."""
        wide = isinstance(self.backend, NativeSums)  # computes in fp32 whatever it is given
        leaves = [
            (t.detach().float() if wide and place < 3 else t.detach()).requires_grad_(needed)
            for place, (t, needed) in enumerate(zip(tensors, needs, strict=True))
        ]
        wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        with recording(tensors[0].device.type):
            if isinstance(self.backend, NativeSums):
                out = self._pulled(self.backend, grad.float(), leaves, scalars)
                grad = torch.ones_like(out)
            else:
                out = self._out(self.backend, leaves, scalars)
            return list(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True, materialize_grads=True))

    def _pulled(self, backend: NativeSums, grad: Tensor, leaves: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        """The products of the gradient's rows and the result's, `[B, H, n_q, 1]` in fp64."""
        q, k, v, *captures = leaves
        scope = linear.scope_of(self.spec, q, k, captures, scalars, compute=torch.float64)
        if self.mixed is None:
            pulled, total = backend.pulled(grad, q, k, v, backend.factors(q, k, captures, scalars))
            return linear.finished(self.spec, scope, pulled, total)
        near, lse, queries, keys = self._near(q, k, v, captures, scalars)
        pulled, total = backend.pulled(grad, queries, keys, v, backend.factors(queries, keys, captures, scalars))
        beside = (grad * near).sum(-1, keepdim=True).double()
        out = mixed._joined(beside, lse.double().unsqueeze(-1), pulled / total.clamp_min(LEAST), total)
        return mixed._gated(self.spec, scope, out)

    def _near(
        self, q: Tensor, k: Tensor, v: Tensor, captures: list[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The softmax part of a mixed attention with its lse, and the features of queries and keys of the other."""
        assert self.mixed is not None
        width = self.mixed.width
        near, lse = torch.ops.attnopt.attention.default(
            q[..., :width], k[..., :width], v, captures, list(scalars), self.mixed.near.text
        )
        return near, lse, q[..., width:], k[..., width:]

    def _out(self, backend: TritonLinear, leaves: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
        q, k, v, *captures = leaves
        scope = linear.scope_of(self.spec, q, k, captures, scalars)
        if self.mixed is None:
            found, total = backend.sums(q, k, v, scalars, backend.factors(q, k, captures, scalars))
            return linear.finished(self.spec, scope, found, total.unsqueeze(-1))
        near, lse, queries, keys = self._near(q, k, v, captures, scalars)
        made = backend.factors(queries, keys, captures, scalars)
        found, total = backend.sums(queries, keys, v, scalars, made)
        total = total.unsqueeze(-1)
        out = mixed._joined(near.float(), lse.unsqueeze(-1), found / total.clamp_min(LEAST), total)
        return mixed._gated(self.spec, scope, out)


_KNOWN: dict[Any, Gradients | None] = {}
_LOCK = threading.Lock()


def enabled(q: Tensor, options: Options) -> bool:
    """Whether kernels of some language run on this tensor under these options."""
    if runs_on(q.device, options):
        return True
    return q.device.type == "cpu" and not options.disable and options.kernel in ("auto", "cpp")


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
    problem = "" if runs_on(q.device, options) else _better(parts, q, k, needs)
    if problem:
        log.info("gradients of %s run in torch's operators: %s", spec, problem)
        return None
    try:
        kernels = _kernels(spec, form, parts, q, options, warn)
        if kernels is None:
            return None  # it was said why
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
    warn(f"no kernel for the gradients of a linear attention: {problem}. Torch's operators compute them.")
    return None


def _better(parts: MixedForm | None, q: Tensor, k: Tensor, needs: Sequence[bool]) -> str:
    """Why torch's operators are the better way on the CPU; empty if they are not."""
    if min(q.shape[2], k.shape[2]) < CHUNK:
        return f"fewer than {CHUNK} queries or keys"
    if parts is None:
        return ""
    heads = parts.near.heads
    if heads.k != heads.v or heads.k_map != heads.v_map:
        return "keys and values of the window have head maps of their own"
    return "captures of an attention with a window are learned" if any(needs[3:]) else ""


def _kernels(
    spec: AttentionSpec, form: LinearForm, parts: MixedForm | None, q: Tensor, options: Options,
    warn: Callable[[str], None],
) -> Gradients | None:  # fmt: skip
    key = spec.key, q.dtype, q.device.type, options
    with _LOCK:
        if key not in _KNOWN:
            far = spec if parts is None else parts.far
            gpu = runs_on(q.device, options)
            backend = build(far, form, q, options, warn) if gpu else build_sums(far, form, options, warn)
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
    places = [i for i, needed in enumerate(needs) if needed]
    if isinstance(kernels.backend, NativeSums):
        return objection(kernels.spec, told, None, few, scalars, needs, dict(zip(places, found, strict=True)))
    golden, eager = (
        expected(kernels.spec, told, None, few, scalars, needs, work) for work in (torch.float64, q.dtype)
    )  # fmt: skip
    for place, g, e, x in zip(places, golden, eager, found, strict=True):
        verdict = compare(g, e, x.to(few[place].dtype), gradients=True)
        if not verdict.ok:
            name = ("q", "k", "v", *(c.name for c in kernels.spec.captures))[place]
            return f"the gradient of {name} disagrees with the reference ({verdict})"
    return ""
