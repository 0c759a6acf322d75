"""Gradients by Triton kernels on CUDA tensors; None where there are none, and the reference takes over."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen import triton
from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_loads import k_axes
from attnopt.codegen.triton_fit import fitting
from attnopt.codegen.triton_plans import Chip, TritonPlan
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.capturing import capturing, refuse
from attnopt.runtime.cpp_gradient import Saved, objection, sample, with_lse
from attnopt.runtime.native import layout_of
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_call import launch, tuned
from attnopt.runtime.triton_launch import chip_of, far, on, runs_on, wide
from attnopt.runtime.triton_tune import Tuner
from attnopt.spec import AttentionSpec, Pointwise

# Queries and keys of the problem on which kernels are compared with the reference before their first use.
_SAMPLE = 80


@dataclass
class Kernels:
    """The kernels of one spec, layout, chip and set of learned captures; `problem` is why they may not be used."""

    spec: AttentionSpec
    layout: Layout
    chip: Chip
    learned: tuple[str, ...]
    tuner: Tuner | None = None
    ahead: Ahead | None = None
    problem: str = ""
    checked: set[TritonPlan] = field(default_factory=set)
    inside: set[tuple[Any, ...]] = field(default_factory=set)
    forward: list[triton.TritonKernel] = field(default_factory=list)
    backward: list[triton.TritonKernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads, self.by_data, self.held = self.spec.heads, by_data(self.spec), self.ahead or Ahead(self.chip, None)
        self.problem = triton.supports_backward(self.spec, self.layout, self.learned) or ""
        if not self.problem:
            about = (self.spec, self.chip, self.layout.dtype)
            self.forward = [triton.emit(self.spec, self.layout, plan) for plan in fitting(*about, "forward")]
            found = fitting(*about, "backward")
            self.backward = [triton.emit_backward(self.spec, self.layout, plan, self.learned) for plan in found]
            self.forward, self.backward = self.held.first(self.forward), self.held.first(self.backward)
            if not self.forward or not self.backward:
                self.problem = f"no plan for heads of {heads.d_qk}/{heads.d_v} fits {self.chip.name}"

    def leaves(self, tensors: Sequence[Tensor], scalars: Sequence[int]) -> str:
        """Which load leaves its tensor at these sizes, in words; empty if none does.

        Raises `CompileError` while a CUDA graph is recorded, where this cannot be found out.
        """
        q, k, _, *captures = tensors
        if not captures:
            return ""
        sizes = (q.shape, k.shape[2], *(t.shape for t in captures), *scalars)
        known = sizes in self.inside
        refuse(q, known, self.by_data, captures)
        if known and not self.by_data:
            return ""
        problem = outside(self.spec, q, k, captures, scalars, known)
        if not problem:
            self.inside.add(sizes)
        return problem or ""

    def prepare(
        self, grad: Tensor, dlse: Tensor | None, tensors: Sequence[Tensor], scalars: Sequence[int]
    ) -> list[triton.TritonKernel]:
        """The kernels of the gradients for these sizes, the best first; measured now where the options say so."""
        if self.tuner is None or self.held.holds(self.backward[0]):
            return self.backward
        q, k = tensors[:2]
        make = functools.partial(triton.emit_backward, self.spec, self.layout, learned=self.learned)
        out, lse = self._results(tensors, scalars) if self.tuner.options.tune and not capturing() else (None, None)
        given = (*tensors, *scalars, out, lse, grad, dlse)
        run = lambda kernel: launch([kernel], given, {}, "attention_backward")  # noqa: E731
        return tuned(self.tuner, "backward", self.backward, lambda plan: make(plan=plan), run, q, k)

    def _results(self, tensors: Sequence[Tensor], scalars: Sequence[int]) -> tuple[Tensor, Tensor]:
        q, v = tensors[0], tensors[2]
        # Rounded results would be summed up in the gradients of tables.
        exact = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=torch.float32).transpose(1, 2)
        made: tuple[Tensor, Tensor] = launch(
            self.forward, (*tensors, *scalars), {"out": exact}, module_of=self.held.module
        )
        return made

    def run(
        self,
        grad: Tensor,
        dlse: Tensor | None,
        tensors: Sequence[Tensor],
        scalars: Sequence[int],
        backward: list[triton.TritonKernel],
        saved: Saved = (None, None),
    ) -> dict[int, Tensor]:
        """Gradients of q, k, v and the learned captures by their place among the tensors. Raises `CompileError`.

        `saved`: the result and lse that the forward gave, where they were kept; else they are made again.
        """
        out, lse = saved
        if isinstance(self.spec.normalizer, Pointwise):  # its gradients mention neither
            out, lse = grad, torch.zeros(grad.shape[:3], dtype=torch.float32, device=grad.device)
        elif out is None or lse is None or self.learned or lse.shape != out.shape[:3] or not lse.is_contiguous():
            out, lse = self._results(tensors, scalars)
        given = (*tensors, *scalars, out, lse, grad, dlse)
        dq, dk, dv, *tables = launch(backward, given, {}, "attention_backward", self.held.module)
        names = [c.name for c in self.spec.captures]
        places = sorted(3 + names.index(name) for name in self.learned)
        return {0: dq, 1: dk, 2: dv, **dict(zip(places, tables, strict=True))}


def recorded_text(text: str, q: Tensor, options: Options) -> str:
    """The spec to run where gradients will be wanted: it returns lse if Triton kernels may compute them from it."""
    return with_lse(text) if q.dtype != torch.float64 and runs_on(q.device, options) else text


_KNOWN: dict[Any, Kernels] = {}
_LOCK = threading.Lock()


def gradients(
    spec: AttentionSpec,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    warn: Callable[[str], None],
    options: Options | None = None,
    saved: Saved = (None, None),
) -> list[Tensor] | None:
    """Gradients of the tensors (q, k, v, captures...) that `needs` marks, contiguous and in their dtypes.

    None, and a warning with the reason, where the kernels do not exist, do not run here or disagree with the
    reference on a small part of the inputs. `saved`: the result and lse of the forward, where they were kept.
    """
    q, k, v, *captures = tensors
    if not q.numel() or not k.shape[2] or not any(needs):
        return None
    try:
        kernels = _kernels(spec, q, captures, needs, options, warn)
        problem = kernels.problem or far(q, k, v, scalars, kernels.backward[0].plan.block_n) or wide(grad)
        problem = problem or kernels.leaves(tensors, scalars)
        if not problem:
            # Read without strides: that of a sum is one number expanded.
            dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
            # With one key weights are 1 and gradients of logits nothing but roundings.
            check = k.shape[2] > 1 and (options is None or options.first_use_check)
            with on(q.device), torch.no_grad():
                best = kernels.prepare(grad, dlse, tensors, scalars)
                if check and best[0].plan not in kernels.checked and not capturing():
                    kernels.problem = problem = _disagrees(kernels, grad, dlse, tensors, scalars, needs, best)
                    kernels.checked.add(best[0].plan)
                if not problem:
                    found = kernels.run(grad, dlse, tensors, scalars, best, saved)
                    return [found[i].to(t.dtype) for i, t in enumerate(tensors) if needs[i]]
    except AttnoptError as error:
        problem = str(error)
    warn(f"no Triton kernel for these gradients: {problem.rstrip('.')}. The reference computes them instead.")
    return None


def _kernels(
    spec: AttentionSpec,
    q: Tensor,
    captures: Sequence[Tensor],
    needs: Sequence[bool],
    options: Options | None,
    warn: Callable[[str], None],
) -> Kernels:
    wanted = replace(spec, returns=("lse",))
    learned = tuple(c.name for c, needed in zip(spec.captures, needs[3:], strict=True) if needed)
    layout, chip = layout_of(k_axes(spec), q, captures), chip_of(q.device)
    key = (spec.key, layout, chip, learned, options and (options.tune, options.cache_dir, options.aot_dir))
    with _LOCK:
        if key not in _KNOWN:
            tuner = options and Tuner(wanted, layout.dtype, chip, options, more=",".join(learned))
            _KNOWN[key] = Kernels(wanted, layout, chip, learned, tuner, Ahead(chip, options, warn))
        return _KNOWN[key]


def _disagrees(
    kernels: Kernels,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    scalars: Sequence[int],
    needs: Sequence[bool],
    backward: list[triton.TritonKernel],
) -> str:
    """Why the kernels are not trusted, judged on some queries and keys; empty if they are."""
    few, *grads = sample(kernels.spec, grad, dlse, tensors, scalars, _SAMPLE)
    found = kernels.run(*grads, few, scalars, backward)
    return objection(kernels.spec, *grads, few, scalars, needs, found)
