"""What a kernel costs besides its running: the first call, every call, and memory."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnopt.bench.cases import Case, cases
from attnopt.demo.measure import peak_memory
from attnopt.options import Options
from attnopt.runtime.dispatch import Dispatcher
from attnopt.runtime.op import attention

_TIMES = 3
_CALLS = 2000


@dataclass(frozen=True)
class Cost:
    """One row: a value and the most that it may be, both in `unit`."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether the value is no more than it may be."""
        return self.value <= self.limit


def cost(name: str, threads: int, quick: bool) -> Cost:
    """Measure the row of `COSTS` with this name; `quick` takes shorter sequences."""
    torch.set_num_threads(threads)
    limit, unit, run = COSTS[name]
    return Cost(name, run(quick), limit, unit)


def first_calls(copies: int = _TIMES) -> tuple[float, float]:
    """Seconds of the first call of an attention, compiler included; and with the kernel in the cache on disk.

    Medians, on the wall. Both check inputs, build the text, load the kernel and compare its result with the reference.
    Every one has a folder of its own, so that no loaded library is met again.
    """
    case = next(case for case in cases(quick=True) if case.name == "ALiBi")
    cold, warm = [], []
    for _ in range(copies):
        with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
            first, second = Path(folder, "first"), Path(folder, "second")
            cold.append(_first_call(case, first))
            shutil.copytree(first, second)
            warm.append(_first_call(case, second))
    return statistics.median(cold), statistics.median(warm)


def _first_call(case: Case, folder: Path) -> float:
    inputs, captures = case.inputs(), [make() for make in case.makers]
    dispatcher = Dispatcher(Options.make({"cache_dir": str(folder)}))
    start = time.perf_counter()
    dispatcher.run(*inputs, captures, [], case.spec.text)
    return time.perf_counter() - start


def per_call(calls: int = _CALLS) -> float:
    """Seconds of a call with one head, one query and one key: all but a few nanoseconds are not the attention.

    A median of runs, in the time that the thread computed.
    """
    case = next(case for case in cases(quick=True) if case.name == "short S=1")
    inputs, text = tuple(t[:1] for t in case.inputs()), case.spec.text
    with torch.no_grad():
        attention(text, *inputs)
        return statistics.median(_timed(lambda: attention(text, *inputs), calls) for _ in range(9))


def _timed(call: Callable[[], object], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times


def extra_memory(length: int) -> float:
    """Bytes by which a causal attention of so many tokens raises the most memory that the process ever holds.

    Its result is part of them. NaN where the system does not say.
    """
    case = next(case for case in cases(quick=True) if case.name == "causal D=64")
    short, text = case.inputs(), case.spec.text

    def long(t: Tensor) -> Tensor:
        return torch.randn(1, t.shape[1], length, t.shape[3], generator=torch.Generator().manual_seed(0))

    inputs = tuple(long(t) for t in short)
    with torch.no_grad():
        attention(text, *(t[:, :, :2048] for t in inputs))  # compiles the kernel
        peak = peak_memory(lambda: attention(text, *inputs))
    return float("nan") if peak is None else float(peak)


Row = tuple[float, str, Callable[[bool], float]]
COSTS: dict[str, Row] = {
    "first call, compiled": (3, "s", lambda quick: first_calls(1 if quick else _TIMES)[0]),
    "first call, kernel on disk": (50, "ms", lambda quick: 1e3 * first_calls(1 if quick else _TIMES)[1]),
    "every call beside its attention": (30, "µs", lambda quick: 1e6 * per_call()),
    "memory for 32,768 tokens": (500, "MB", lambda quick: extra_memory(1 << 15) / 1e6),
}
