"""Runs every row in a process of its own, so that a crash, a hang or a memory blow-up loses one row and says so.

A row is a JSON file in the work folder; a second run continues where the first one stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt.coverage.totals import outside
from attnopt.options import Options

PRELOAD = ("attnopt.coverage.warm",)
PRELOAD_INDUCTOR = (*PRELOAD, "attnopt.coverage.warm_inductor")


@dataclass(frozen=True)
class Plan:
    """What to run: rows, how many at a time, limits of each, and how each is measured."""

    rows: tuple[tuple[str, str], ...]
    folder: Path
    jobs: int = 2
    seconds: float = 120.0
    gigabytes: float = 8.0
    kernel: str = "auto"


def row_path(folder: Path, architecture: str, variant: str) -> Path:
    """The file of one row."""
    return folder / f"{architecture.replace('/', '_')}.{variant}.json"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every row in the folder, in alphabetical order of its file."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def settled(row: dict[str, Any]) -> bool:
    """Whether nothing is open about a row: there is no such variant, or every site is fused and the outputs agree."""
    if row["status"] in ("not applicable", "counted"):
        return True
    fused = row["status"] == "measured" and all(s["status"] == "fused" for s in row["sites"])
    unknown = any(graph["normalizers"] for graph in row.get("unknown", ()))
    return fused and not row["missed"] and not unknown and not outside(row)


def pending(plan: Plan, retry: bool) -> list[tuple[str, str]]:
    """The rows without a file, and with `retry` those that are not settled."""
    out = []
    for architecture, variant in plan.rows:
        path = row_path(plan.folder, architecture, variant)
        if not path.is_file() or (retry and not settled(json.loads(path.read_text(encoding="utf-8")))):
            out.append((architecture, variant))
    return out


def run(plan: Plan, rows: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Run the rows, `plan.jobs` architectures at a time; yields each row as it ends. Every row is on disk by then."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    waiting: dict[str, list[str]] = {}
    for architecture, variant in rows:
        row_path(plan.folder, architecture, variant).unlink(missing_ok=True)
        waiting.setdefault(architecture, []).append(variant)
    context, running = _context(any(variant == "inductor" for _, variant in rows)), {}
    settings = {**asdict(plan), "rows": (), "folder": str(plan.folder)}
    try:
        while waiting or running:
            while waiting and len(running) < plan.jobs:
                architecture, variants = next(iter(waiting.items()))
                del waiting[architecture]
                process = context.Process(target=work, args=(architecture, variants, settings), daemon=True)
                process.start()
                running[architecture] = _Running(process, variants, time.monotonic())
            for architecture in list(running):
                yield from _ended(plan, architecture, running, waiting)
            time.sleep(0.05)
    finally:
        for task in running.values():
            task.process.kill()


def _context(inductor: bool) -> Any:
    """Processes forked from one server that has everything loaded, where the system can fork."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if kind == "forkserver":
        context.set_forkserver_preload(list(PRELOAD_INDUCTOR if inductor else PRELOAD))
    return context


@dataclass
class _Running:
    """The process of one architecture, the variants it has still to do, and since when it does the first of them."""

    process: Any
    variants: list[str]
    since: float


def _ended(
    plan: Plan, architecture: str, running: dict[str, _Running], waiting: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    """The rows that have ended; a process that died or hangs loses one row, and what it had still to do waits again."""
    task = running[architecture]
    alive = task.process.is_alive()
    while task.variants and row_path(plan.folder, architecture, task.variants[0]).is_file():
        path = row_path(plan.folder, architecture, task.variants.pop(0))
        task.since = time.monotonic()
        yield json.loads(path.read_text(encoding="utf-8"))
    late = time.monotonic() - task.since > plan.seconds
    if alive and not late:
        return
    task.process.kill()
    task.process.join()
    del running[architecture]
    if not task.variants:
        return
    lost = task.variants.pop(0)
    why = f"it took more than {plan.seconds:.0f} s" if late else f"its process ended with {task.process.exitcode}"
    row = {"architecture": architecture, "variant": lost, "status": "crashed", "reason": why}
    _write(row_path(plan.folder, architecture, lost), row)
    if task.variants:
        waiting[architecture] = task.variants
    yield row


def work(architecture: str, variants: Sequence[str], settings: dict[str, Any]) -> None:
    """The rows of one architecture, in the child process."""
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _limit(settings["gigabytes"])
    _silence()
    for variant in variants:
        row = _row(architecture, variant, settings)
        _write(row_path(Path(settings["folder"]), architecture, variant), row)


def _row(architecture: str, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
    known = {"architecture": architecture, "variant": variant}
    path = row_path(Path(settings["folder"]), architecture, "eager")
    if variant != "eager" and path.is_file():
        eager = json.loads(path.read_text(encoding="utf-8"))
        if eager["status"] == "not built":
            return {**known, "status": "not built", "reason": eager["reason"]}
    try:
        from attnopt.coverage.measure import measure

        return measure(architecture, variant, Options.make({"kernel": settings["kernel"]}))
    except Exception as error:
        text = " ".join(str(error).split())
        return {**known, "status": "crashed", "reason": f"{type(error).__name__}: {text[:300]}"}


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
