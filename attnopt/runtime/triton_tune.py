"""Which plan of a Triton kernel is fastest at these sizes: measured once, kept in the cache folder, used ever after."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnopt._version import VERSION
from attnopt.codegen.triton_cost import Problem, proposals, spec_class
from attnopt.codegen.triton_plans import Chip, TritonPlan
from attnopt.errors import CacheError, CompileError
from attnopt.options import Options
from attnopt.runtime.cache import Cache, entry_key
from attnopt.runtime.triton_compile import triton_version
from attnopt.spec import AttentionSpec

# A clock takes a call and says how many seconds it took.
Clock = Callable[[Callable[[], Any]], float]
# Plans this much slower than the best so far are not measured a second time.
_HOPELESS = 1.3
_FLUSH = 64 << 20
# Clocks of the device for which the host gets ahead of it: about a millisecond.
_AHEAD = 2_000_000


@dataclass(frozen=True)
class Choice:
    """The outcome of a measurement: the plan, and what every plan took in seconds (None: it does not run)."""

    plan: TritonPlan
    seconds: Mapping[str, float | None]


def fastest(
    plans: Sequence[TritonPlan],
    run: Callable[[TritonPlan], Any],
    clock: Clock,
    show: Callable[[Sequence[TritonPlan]], Iterator[TritonPlan]] = iter,
) -> Choice:
    """Measure `run(plan)` for every plan, twice where it may be the best. Raises `CompileError` if none runs.

    `show` passes the plans on one by one, and may draw how far it is.
    """
    found: dict[TritonPlan, float | None] = {}
    problem = "there are no plans"
    for plan in show(plans):
        try:
            taken = clock(lambda p=plan: run(p))  # type: ignore[misc]
            best = min((x for x in found.values() if x is not None), default=taken)
            if taken <= _HOPELESS * best:
                taken = min(taken, clock(lambda p=plan: run(p)))  # type: ignore[misc]
            found[plan] = taken
        except CompileError as error:
            found[plan], problem = None, str(error)
    running = {plan: taken for plan, taken in found.items() if taken is not None}
    if not running:
        raise CompileError(f"no plan could be measured: {problem}")
    return Choice(min(running, key=running.__getitem__), {str(plan): taken for plan, taken in found.items()})


class Tuner:
    """What is known of the plans of one spec, dtype and chip. `more`: what else of the kernels a note depends on."""

    def __init__(
        self, spec: AttentionSpec, dtype: str, chip: Chip, options: Options, clock: Clock | None = None, more: str = ""
    ) -> None:
        self.spec, self.dtype, self.chip, self.options = spec, dtype, chip, options
        self.clock = clock or device_clock
        self.about = " ".join(filter(None, (spec_class(spec, dtype), more)))
        self.known: dict[tuple[str, str], TritonPlan | None] = {}
        self.problem = ""

    def plan(
        self, kind: str, problem: Problem, run: Callable[[TritonPlan], Any] | None = None, device: str = ""
    ) -> TritonPlan | None:
        """The plan that was measured to be fastest for such sizes, now if `run` is given; None if none was.

        Never raises: a cache that cannot be used, or plans that do not run, leave the default. `problem` says why.
        """
        place = kind, problem.shape_class
        if place not in self.known or (self.known[place] is None and run is not None):
            try:
                self.known[place] = self._stored(kind, problem, device) or self._measured(kind, problem, run, device)
            except (CacheError, CompileError, OSError) as error:
                self.known[place], self.problem = None, str(error)
        return self.known[place]

    def key(self, kind: str, problem: Problem, device: str) -> str:
        """Of the note in the cache: all that decides which plan is fastest."""
        proposed = proposals(self.spec, self.chip, self.dtype, kind, problem)
        space = ";".join(sorted(map(repr, proposed)))
        versions = (VERSION, triton_version(), torch.__version__)
        return entry_key("triton plan", *versions, self.chip.name, device, self.about, kind, problem.shape_class, space)

    def _stored(self, kind: str, problem: Problem, device: str) -> TritonPlan | None:
        folder = self.options.cache_path
        if not folder.is_dir():
            return None
        note = Cache(folder).note(self.key(kind, problem, device))
        # Only plans of the tables are taken from the disk: they are known to fit.
        proposed = proposals(self.spec, self.chip, self.dtype, kind, problem)
        return next((p for p in proposed if note is not None and asdict(p) == note.get("plan")), None)

    def _measured(
        self, kind: str, problem: Problem, run: Callable[[TritonPlan], Any] | None, device: str
    ) -> TritonPlan | None:
        if run is None:
            return None
        proposed = proposals(self.spec, self.chip, self.dtype, kind, problem)
        choice = fastest(proposed, run, self.clock, progress(f"tuning {kind} {problem.n_q}x{problem.n_k}"))
        about = {"plan": asdict(choice.plan), "seconds": dict(choice.seconds), "spec": self.about, "device": device,
                 "sizes": [problem.batch, problem.n_q, problem.n_k]}  # fmt: skip
        Cache(self.options.cache_path).put_note(self.key(kind, problem, device), about)
        return choice.plan


def progress(title: str) -> Callable[[Sequence[TritonPlan]], Iterator[TritonPlan]]:
    """Plans one by one, with a bar on a terminal's standard error."""

    def show(plans: Sequence[TritonPlan]) -> Iterator[TritonPlan]:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        yield from track(plans, title, console=console, transient=True, disable=not console.is_terminal)

    return show


def device_clock(call: Callable[[], Any], repeats: int = 9) -> float:
    """Median seconds of a call on the current CUDA device, the L2 cache cleared before each.

    The device is kept busy until the host has launched: what launching takes is no part of a kernel's time.
    """
    flush = torch.empty(_FLUSH, dtype=torch.int32, device="cuda")
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with contextlib.suppress(AttributeError, RuntimeError):  # where there is no such function
            torch.cuda._sleep(_AHEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
