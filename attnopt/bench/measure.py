"""Interleaved timing of one row: medians of many short runs, so that a busy moment hurts all sides alike."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.bench import probes, rivals
from attnopt.bench.cases import Case, scores, tiles, unmodified
from attnopt.runtime.dispatch import kernel_used
from attnopt.runtime.op import attention

log = logging.getLogger("attnopt")
_ENOUGH = 3e-3


@dataclass
class Result:
    """What one row took. Times are medians in milliseconds.

    Attributes:
        ratios: how many times as fast as `sdpa` and `flex`, and as the kernel without the modification (`own`: in
            tiles a second that hold anything to keep).
        shares: of the ceilings `peak` and `read`; `flex peak` is what FlexAttention has of the former.
        targets: least values of these.
    """

    name: str
    kernel: str
    times: dict[str, float]
    ratios: dict[str, float]
    shares: dict[str, float]
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every target is reached."""
        found = {**self.ratios, **self.shares}
        return all(found.get(name, 0.0) >= least for name, least in self.targets.items())

    @property
    def bound(self) -> float:
        """How many times as fast as FlexAttention a kernel at the peak of multiply-adds would be; inf if unknown."""
        share = self.shares.get("flex peak", 0.0)
        return 1 / share if share else math.inf


def clock_of(threads: int) -> Callable[[], float]:
    """With one thread the time that it computed, whoever else wanted the processor; with more, time on the wall."""
    return time.thread_time if threads == 1 else time.perf_counter


def measure(case: Case, threads: int, repeats: int, with_flex: bool) -> Result:
    """One row; every side runs once in each round."""
    torch.set_num_threads(threads)
    clock, captures, inputs = clock_of(threads), [make() for make in case.makers], case.inputs()
    text = case.spec.text
    # Of a learned bias every side gets a copy behind q, k and v.
    inputs = (*inputs, *captures) if case.learned else inputs
    sides: dict[str, Callable[..., Tensor]] = {
        "attnopt": lambda q, k, v, *more: attention(text, q, k, v, more or captures)[0]
    }
    for name, make in (("sdpa", rivals.sdpa), ("flex", rivals.flex if with_flex and not case.backward else None)):
        call = make(case, captures) if make else None
        if call is not None:
            sides[name] = call
    if case.beside is not None:
        beside = case.beside.text
        sides["own"] = lambda q, k, v: attention(beside, q, k, v)[0]
    taken: dict[str, list[float]] = {name: [] for name in sides}
    ceilings: list[tuple[float, float]] = []
    run = _backward if case.backward else _forward
    times = {}
    for name, call in list(sides.items()):
        try:
            run(call, inputs, clock, 1)  # compiles
        except Exception as error:
            if name == "attnopt":
                raise
            log.warning("%s: %s cannot run it (%s) and is left out.", case.name, name, str(error).split("\n", 1)[0])
            del sides[name], taken[name]
            continue
        # The probes leave cold caches behind: short calls are repeated until that no longer matters.
        times[name] = 1 if case.backward else _repeats(lambda call=call: run(call, inputs, clock, 1))
    for _ in range(repeats):
        ceilings.append((probes.peak(clock), probes.read_rate(clock, threads)))
        for name, call in sides.items():
            taken[name].append(run(call, inputs, clock, times[name]))
    result = _result(case, taken, ceilings, threads)
    if not with_flex:
        result.targets.pop("flex", None)
    return result


def _repeats(run: Callable[[], float]) -> int:
    """How many calls are one measurement, by the shortest of a few: the first ones are still slow."""
    least = run()
    for _ in range(4):
        least = least if least >= _ENOUGH else min(least, run())
    return min(200, math.ceil(_ENOUGH / max(least, 1e-9)))


def _result(case: Case, taken: dict[str, list[float]], ceilings: Sequence[tuple[float, float]], threads: int) -> Result:
    heads = case.spec.heads
    ours = statistics.median(taken["attnopt"])
    products = 5 / 2 if case.backward else 1
    work = 2 * scores(case) * (heads.d_qk + heads.d_v) * products
    size = case.batch * case.n_k * (heads.k * heads.d_qk + heads.v * heads.d_v) * case.dtype.itemsize
    peak, read = (statistics.median(c[i] for c in ceilings) for i in (0, 1))
    ratios = {
        name: statistics.median(t / o for t, o in zip(times, taken["attnopt"], strict=True))
        for name, times in taken.items()
        if name != "attnopt"
    }
    plain = unmodified(case)
    if plain is not None and "own" in ratios:
        ratios["own"] *= tiles(case) / tiles(plain)
    times = {name: 1e3 * statistics.median(values) for name, values in taken.items()}
    shares = {"peak": work / ours / (peak * threads), "read": size / ours / read}
    if "flex" in times:
        shares["flex peak"] = work / (times["flex"] / 1e3) / (peak * threads)
    return Result(case.name, kernel_used(case.spec.key) or "", times, ratios, shares, dict(case.targets))


def _forward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], clock: Callable[[], float], times: int) -> float:
    with torch.no_grad():
        start = clock()
        for _ in range(times):
            call(*inputs)
        return (clock() - start) / times


def _backward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], clock: Callable[[], float], times: int) -> float:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    weight = torch.ones_like(out)
    # The engine runs in this thread for tensors on the CPU, so its time counts.
    start = clock()
    torch.autograd.grad(out, leaves, weight)
    return clock() - start
