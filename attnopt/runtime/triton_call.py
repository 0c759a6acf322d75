"""Calls of generated launchers: the first kernel that fits, and the fastest plan where one was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_cost import Problem
from attnopt.codegen.triton_plans import TritonPlan
from attnopt.errors import CompileError
from attnopt.runtime.capturing import capturing
from attnopt.runtime.triton_load import load
from attnopt.runtime.triton_tune import Tuner


def launch(
    kernels: list[TritonKernel],
    arguments: tuple[Any, ...],
    more: Mapping[str, Any] | Callable[[TritonPlan], Mapping[str, Any]],
    name: str = "attention",
    module_of: Callable[[TritonKernel], ModuleType] | None = None,
) -> Any:
    """What the first kernel that fits returns; those before it are removed. Raises `CompileError`.

    `more`: arguments by name, or what makes them for a plan. `module_of`: what loads a kernel; that of an
    `Ahead` takes what was compiled ahead of time.
    """
    while True:
        module = (module_of or load)(kernels[0])
        try:
            return getattr(module, name)(*arguments, **(more(kernels[0].plan) if callable(more) else more))
        except Exception as error:
            if not of_plan(error) or len(kernels) == 1:  # anything else will not get better
                text = str(error).strip().splitlines() or [repr(error)]
                raise CompileError(f"Triton: {text[-1][:300]}") from error
            kernels.pop(0)


def of_plan(error: Exception) -> bool:
    """Whether another plan may do better: the kernel is too large, or the compiler cannot build it with this one."""
    return type(error).__name__ in ("OutOfResources", "PTXASError") or "PassManager::run failed" in str(error)


def tuned(
    tuner: Tuner,
    kind: str,
    usual: list[TritonKernel],
    make: Callable[[TritonPlan], TritonKernel],
    run: Callable[[TritonKernel], Any],
    q: Tensor,
    k: Tensor,
) -> list[TritonKernel]:
    """The kernels with the fastest plan for these sizes first; measured now if the options say so."""
    kernels = {kernel.plan: kernel for kernel in usual}

    def kernel(plan: TritonPlan) -> TritonKernel:
        if plan not in kernels:
            kernels[plan] = make(plan)
        return kernels[plan]

    measure = (lambda plan: run(kernel(plan))) if tuner.options.tune and not capturing() else None
    plan = tuner.plan(kind, Problem(q.shape[0], q.shape[2], k.shape[2]), measure, device_name(q.device))
    if plan is None or plan == usual[0].plan:
        return usual
    first = kernel(plan)
    return [first, *(x for x in usual if x is not first)]


def device_name(device: torch.device) -> str:
    """What the driver calls the device; empty where there is no driver."""
    with contextlib.suppress(RuntimeError, AssertionError):
        return torch.cuda.get_device_name(device)
    return ""
