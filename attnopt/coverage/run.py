"""Runs every row in a process of its own, so that a crash, a hang or a memory blow-up loses one row and says so.

A row is a JSON file in the work folder; a second run continues where the first one stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt.options import Options

PRELOAD = ("attnopt.coverage.warm",)


@dataclass(frozen=True)
class Plan:
    """What to run: rows, how many at a time, limits of each, and how each is measured."""

    rows: tuple[tuple[str, str], ...]
    folder: Path
    jobs: int = 2
    seconds: float = 120.0
    gigabytes: float = 8.0
    kernel: str = "auto"
    inductor: bool = False


def row_path(folder: Path, architecture: str, variant: str) -> Path:
    """The file of one row."""
    return folder / f"{architecture.replace('/', '_')}.{variant}.json"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every row in the folder, in alphabetical order of its file."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def settled(row: dict[str, Any]) -> bool:
    """Whether nothing is open about a row: it has no such variant, or every site is fused and close."""
    if row["status"] == "not applicable":
        return True
    return row["status"] == "measured" and not row["missed"] and all(s["status"] == "fused" for s in row["sites"])


def pending(plan: Plan, retry: bool) -> list[tuple[str, str]]:
    """The rows without a file, and with `retry` those that are not settled."""
    out = []
    for architecture, variant in plan.rows:
        path = row_path(plan.folder, architecture, variant)
        if not path.is_file() or (retry and not settled(json.loads(path.read_text(encoding="utf-8")))):
            out.append((architecture, variant))
    return out


def run(plan: Plan, rows: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Run the rows, `plan.jobs` at a time; yields each as it ends. Every row is on disk by then."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if kind == "forkserver":
        context.set_forkserver_preload(list(PRELOAD))
    waiting, running = list(rows), {}
    settings = {**asdict(plan), "rows": (), "folder": str(plan.folder)}
    try:
        while waiting or running:
            while waiting and len(running) < plan.jobs:
                row = waiting.pop(0)
                path = row_path(plan.folder, *row)
                path.unlink(missing_ok=True)
                process = context.Process(target=work, args=(*row, settings), daemon=True)
                process.start()
                running[row] = (process, time.monotonic())
            yield from _ended(plan, running)
            time.sleep(0.05)
    finally:
        for process, _ in running.values():
            process.kill()


def _ended(plan: Plan, running: dict[tuple[str, str], Any]) -> Iterable[dict[str, Any]]:
    for row, (process, start) in list(running.items()):
        late = time.monotonic() - start > plan.seconds
        if process.is_alive() and not late:
            continue
        if process.is_alive():
            process.kill()
        process.join()
        del running[row]
        path = row_path(plan.folder, *row)
        if not path.is_file():
            why = f"it took more than {plan.seconds:.0f} s" if late else f"its process ended with {process.exitcode}"
            _write(path, {"architecture": row[0], "variant": row[1], "status": "crashed", "reason": why})
        yield json.loads(path.read_text(encoding="utf-8"))


def work(architecture: str, variant: str, settings: dict[str, Any]) -> None:
    """One row, in the child process."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _limit(settings["gigabytes"])
    _silence()
    try:
        from attnopt.coverage.measure import measure

        options = Options.make({"kernel": settings["kernel"]})
        row = measure(architecture, variant, options, settings["inductor"])
    except Exception as error:
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
        row = {"architecture": architecture, "variant": variant, "status": "crashed", "reason": text}
    _write(row_path(Path(settings["folder"]), architecture, variant), row)


def _write(path: Path, row: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1), encoding="utf-8")
    part.replace(path)


def _limit(gigabytes: float) -> None:
    """A limit of address space, where the system has one, so that a wrong size fails instead of swapping."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    except (ImportError, ValueError, OSError):
        return


def _silence() -> None:
    """What models print is no part of the run's own output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
