"""Jobs in processes of their own: one that crashes, hangs or breaks its driver costs its own result alone.

A CUDA error such as an illegal address stays with a process for good. A worker that has met one is left, and another
takes its place.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any

Result = dict[str, Any]
LATE = "left out: no time was left"
# Seconds that a process has to end by itself when it is no longer needed.
_PATIENCE = 2.0


def attempt(work: Callable[[], Result]) -> Result:
    """What the work returns, or why it failed."""
    try:
        return work()
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return {"ok": False, "note": f"{type(error).__name__}: {text}"}


@dataclass
class _Worker:
    """A process, this end of its pipe, the place of its job (None: idle) and since when it has it."""

    process: Any
    pipe: Any
    place: int | None = None
    since: float = 0.0


class Workers:
    """As many processes as there are cores to spare, or `count`, started when they are needed."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or max(1, (os.cpu_count() or 2) - 2)
        self.all: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all:
            worker.pipe.close()  # an idle one ends by itself
        until = time.monotonic() + _PATIENCE
        for worker in self.all:
            worker.process.join(max(0.0, until - time.monotonic()))
            self._end(worker)

    def run(
        self, work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], begin_by: float, end_by: float, limit: float
    ) -> Iterator[tuple[int, Result]]:
        """`(place, work(*job))` of every job, as they are done.

        Args:
            work: a function of a module, given to a process by name.
            jobs: its arguments, in the order in which they begin.
            begin_by: the time of the monotonic clock after which no job begins.
            end_by: that at which those that still run are left.
            limit: seconds after which a single job is left.
        """
        waiting = deque(enumerate(jobs))
        while waiting or any(w.place is not None for w in self.all):
            now = time.monotonic()
            if now >= begin_by:
                while waiting:
                    yield waiting.popleft()[0], {"ok": None, "note": LATE}
            self._give(work, waiting)
            busy = [w for w in self.all if w.place is not None]
            if not busy:
                continue
            soonest = min([end_by, *(w.since + limit for w in busy)])
            ready = connection.wait([w.pipe for w in busy], max(0.0, soonest - time.monotonic()))
            now = time.monotonic()
            for worker in busy:
                place = worker.place
                assert place is not None
                if worker.pipe in ready:
                    yield place, self._received(worker)
                elif now >= end_by or now >= worker.since + limit:
                    self._leave(worker)
                    late = LATE if now >= end_by else f"still ran after {limit:.0f} s"
                    yield place, {"ok": None if now >= end_by else False, "note": late}

    def _give(self, work: Callable[..., Result], waiting: deque[tuple[int, tuple[Any, ...]]]) -> None:
        while waiting:
            worker = next((w for w in self.all if w.place is None), None)
            if worker is None and len(self.all) < self.count:
                worker = self._start()
            if worker is None:
                return
            try:
                worker.pipe.send((work, waiting[0][1]))
            except OSError:  # it ended while it was idle
                self._leave(worker)
                continue
            worker.place, worker.since = waiting.popleft()[0], time.monotonic()

    def _start(self) -> _Worker:
        context = get_context("spawn")
        mine, other = context.Pipe()
        process = context.Process(target=_serve, args=(other,))
        process.start()
        other.close()
        self.all.append(_Worker(process, mine))
        return self.all[-1]

    def _received(self, worker: _Worker) -> Result:
        try:
            result, sound = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(_PATIENCE)
            code = worker.process.exitcode
            self._leave(worker)
            return {"ok": False, "note": f"its process ended with status {code}"}
        worker.place = None
        if not sound:
            self._leave(worker)
        return dict(result)

    def _leave(self, worker: _Worker) -> None:
        self.all.remove(worker)
        worker.pipe.close()
        self._end(worker)

    @staticmethod
    def _end(worker: _Worker) -> None:
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(_PATIENCE)


def _serve(pipe: Any) -> None:
    """Do what comes through the pipe, until it is closed or this process cannot go on."""
    while True:
        try:
            work, given = pipe.recv()
        except (EOFError, OSError):
            return
        result = attempt(lambda work=work, given=given: work(*given))  # type: ignore[misc]
        sound = _sound()
        if not sound and result.get("ok"):
            result = {"ok": False, "note": "the driver failed afterwards"}
        pipe.send((result, sound))
        if not sound:
            os._exit(1)


def _sound() -> bool:
    """Whether the driver still works here; gives memory that is free back to it."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # whatever it is, nothing can be measured here any more
        return False
    return True
