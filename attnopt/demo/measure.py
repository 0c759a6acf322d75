"""Golden outputs in fp64, errors against them, interleaved times, peak memory."""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Tensors = list[torch.Tensor]


class _InDouble(TorchFunctionMode):
    """Casts to fp32 that a model writes out (norms, softmax, RoPE) become casts to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        swap = {torch.float32: torch.float64, torch.float: torch.float64}
        args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {name: swap.get(v, v) if isinstance(v, torch.dtype) else v for name, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def tensors(output: Any) -> Tensors:
    """The floating-point tensors of a model's output, in order."""
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@torch.no_grad()
def golden(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensors:
    """Outputs of a copy of the model in fp64, every fp32 step inside included."""
    double = copy.deepcopy(model).double()
    args, kwargs = pytree.tree_map(_in_double, (tuple(args), dict(kwargs)))
    with _InDouble():
        return tensors(double(*args, **kwargs))


@dataclass(frozen=True)
class Error:
    """Distance from the golden outputs: the largest and the root mean square, over all outputs."""

    max: float
    rms: float


def error(outputs: Tensors, reference: Tensors) -> Error:
    """NaN where the outputs differ in number, shape, or in which elements are finite."""
    if [o.shape for o in outputs] != [r.shape for r in reference]:
        return Error(float("nan"), float("nan"))
    largest, total, count = 0.0, 0.0, 0
    for output, exact in zip(outputs, reference, strict=True):
        finite = exact.isfinite()
        if not torch.equal(finite, output.isfinite()):
            return Error(float("nan"), float("nan"))
        difference = (output.double() - exact)[finite]
        largest = max(largest, difference.abs().max().item() if difference.numel() else 0.0)
        total, count = total + difference.square().sum().item(), count + difference.numel()
    return Error(largest, (total / max(count, 1)) ** 0.5)


def within_contract(ours: Error, eager: Error, reference: Tensors) -> bool:
    """`rms <= 1.2 rms(eager) + eps rms(golden)` and `max <= 2 max(eager) + 2 ulp(golden)`; NaN is outside."""
    finite = torch.cat([t[t.isfinite()].flatten() for t in reference])
    epsilon = torch.finfo(torch.float32).eps
    rms, largest = finite.square().mean().sqrt().item(), finite.abs().max().item()
    return ours.rms <= 1.2 * eager.rms + epsilon * rms and ours.max <= 2 * eager.max + 2 * epsilon * largest


def interleaved(first: Callable[[], Any], second: Callable[[], Any], budget: float = 4.0) -> tuple[float, float]:
    """Median seconds of both, measured in turns so that a change of clock meets both alike; 5 to 30 turns."""
    start = time.perf_counter()
    first(), second()
    turns = min(30, max(5, int(budget / max(time.perf_counter() - start, 1e-6))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rose at its peak during the call; None where the system cannot tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    gc.collect()
    _return_free_memory()
    try:
        reset.write_text("5")  # the peak restarts at the present size
        before = _field(status.read_text(), "VmRSS")
        call()
        return max(0, _field(status.read_text(), "VmHWM") - before)
    except (OSError, KeyError):
        return None


def _field(text: str, name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(values[name].split()[0]) * 1024


def _return_free_memory() -> None:
    """Freed blocks go back to the system, so that a call that reuses them is not counted as free of cost."""
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
    if trim is not None:
        trim(0)
