"""One run on a GPU, under nine minutes: is every kernel right on the chip, which plans are fastest, how fast is it.

    python benchmarks/gpu.py --out benchmarks/results        # gpu.json, gpu.md, gpu.png
    python benchmarks/gpu.py --dry                           # the same steps on fake tensors, where there is no GPU

1. Correctness: forward, decode and backward of every usual spec, in bf16, fp16 and fp32, against fp64 by the rule of
   `attnopt.runtime.validate`; free memory is filled with NaN first. Then the ways on which models reach kernels:
   choices of blocks, lists, a CUDA graph, `torch.compile`, machine code from a folder.
2. Tuning: every plan that the cost model proposes for a row of the table is compiled, in parallel, and then measured.
   What is chosen is kept in the cache folder, where the dispatcher finds it.
3. The table: times are medians of CUDA events over a cleared L2 cache, beside PyTorch's kernels by name, FlexAttention
   and what the chip's measured rates allow.

Files are written anew after every step, so that a run that is cut off leaves what it has. No call runs in this process
(`gpu_parts/workers.py`): one that fails, crashes or hangs says why and costs nothing else. Every phase has a deadline,
and what still runs after 525 s is left. A dry run prints how long all of it should take on the chip.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_parts import check, estimate, report, table
from gpu_parts.estimate import BUDGET, LAST
from gpu_parts.rows import ROWS, Row, judge
from gpu_parts.workers import LATE, Workers, attempt

from attnopt._version import VERSION
from attnopt.codegen.triton_plans import CHIPS, Chip
from attnopt.options import Options
from attnopt.runtime.triton_compile import triton_version
from attnopt.runtime.triton_launch import chip_of

Say = Callable[[str], None]
# How many wrong calls are said one by one; the files have all.
_SAID = 30
# Seconds after which a call of each phase is left: a process that starts is part of its first one.
LIMIT = {"correctness": 120.0, "compile": 75.0, "table": 80.0, "thorough": 60.0}


class Run:
    """What is known so far, and what is left to do. `save` is given all of it after every step."""

    def __init__(
        self, chip: Chip, rows: Sequence[Row], say: Say, save: Callable[[dict[str, Any]], None], dry: bool
    ) -> None:
        self.chip, self.rows, self.say, self.save, self.dry = chip, rows, say, save, dry
        self.begun = time.monotonic()
        self.options = Options.make({"tune": not dry})
        self.found: dict[str, Any] = {
            "device": f"dry run for {chip.name}" if dry else torch.cuda.get_device_name(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
            "command": "python " + shlex.join(["benchmarks/gpu.py", *sys.argv[1:]]),
            "seconds": 0.0,
            "expected": {},
            "torch": torch.__version__,
            "triton": triton_version(),
            "attnopt": VERSION,
            "machine": platform.machine(),
            "chip": asdict(chip),
            "plans": sum(len(table.plans(row, chip)) for row in rows),
            "roof": None,
            "correctness": [],
            "table": [],
        }

    def keep(self) -> None:
        """Write down what is known."""
        self.found["seconds"] = time.monotonic() - self.begun
        judge(self.found["table"], {row.name: row.targets for row in self.rows})
        self.save(self.found)

    def each(
        self, pool: Workers | None, phase: str, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], last: float
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every job's place and result, as it is done: nothing begins after the phase, nothing runs on after `last`."""
        if pool is None:
            yield from ((place, attempt(lambda j=job: work(*j))) for place, job in enumerate(jobs))  # type: ignore[misc]
            return
        times = self.begun + BUDGET[phase], self.begun + last
        yield from pool.run(work, jobs, *times, LIMIT[phase])

    def correctness(self, pool: Workers | None, only: Sequence[str]) -> None:
        """Every call with its verdict."""
        wanted = check.checks(only)
        plans = {row.name: len(table.plans(row, self.chip)) for row in self.rows}
        self.found["expected"] = estimate.seconds(self.rows, len(wanted), plans)
        self.say(estimate.text(self.found["expected"]))
        rows = [c.about | {"ok": None, "note": LATE} for c in wanted]
        self.found["correctness"] = rows
        work = (lambda c, chip: check.judged(c, CHIPS[chip], False)) if self.dry else check.work
        jobs = [(c, self.chip.name) for c in wanted]
        wrong = 0
        for done, (place, result) in enumerate(self.each(pool, "correctness", work, jobs, BUDGET["correctness"])):
            rows[place] |= result
            wrong += result["ok"] is False
            if result["ok"] is False and wrong <= _SAID:
                self.say(f"wrong: {' '.join(map(str, rows[place].values()))}"[:240])
            if done % 50 == 49:
                self.keep()
        self.say(f"{sum(bool(r['ok']) for r in rows)} of {len(rows)} calls right after {self.passed()}")
        self.keep()

    def compile_plans(self, pool: Workers | None) -> None:
        """Compile what tuning is going to measure."""
        if self.dry:
            return
        jobs = [(row, plan, self.chip.name) for row in self.rows for plan in table.plans(row, self.chip)]
        results = [r for _, r in self.each(pool, "compile", check.warm, jobs, BUDGET["compile"])]
        failed = [r["note"] for r in results if r["ok"] is False]
        self.say(f"{sum(bool(r['ok']) for r in results)} of {len(jobs)} plans compiled after {self.passed()}")
        for note in dict.fromkeys(failed):
            self.say(f"  {failed.count(note)} failed: {note}")

    def measure(self, pool: Workers | None) -> None:
        """The table, row by row, as far as the time allows."""
        roof, work = None, table.dry if self.dry else table.whole
        if not self.dry:
            _, found = next(iter(self.each(pool, "table", table.ceilings, [()], LAST)))
            roof = self.found["roof"] = found.get("roof")
            self.say(f"the chip's rates: {roof or found['note']}")
        jobs = [(row, self.chip.name, roof, self.options) for row in self.rows]
        for place, result in self.each(pool, "table", work, jobs, LAST):
            row = table.about(self.rows[place]) | result
            self.found["table"].append(row)
            figures = ", ".join(f"{k} {report.cell(row[k])}" for k in report._FIGURES if k in row)
            self.say(f"{row['name']:<24} {figures or row['note']}")
            self.keep()

    def thorough(self, pool: Workers | None) -> None:
        """FlexAttention with its own tuning, for the rows that ask for it."""
        made = {row["name"]: row for row in self.found["table"] if "rivals" in row}
        wanted = [row for row in self.rows if row.thorough and row.name in made]
        for place, result in self.each(pool, "thorough", table.thorough, [(row,) for row in wanted], LAST):
            table.add_thorough(made[wanted[place].name], result)
            self.keep()

    def passed(self) -> str:
        """Seconds since the start, in words."""
        return f"{time.monotonic() - self.begun:.0f} s"


def run(
    dry: bool,
    rows: Sequence[Row] = ROWS,
    only: Sequence[str] = (),
    say: Say = print,
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Everything, in order. Raises `RuntimeError` where there is no GPU and this is no dry run."""
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; --dry takes the same steps on fake tensors.")
    chip = CHIPS["sm_90"] if dry else chip_of(torch.device("cuda"))
    made = Run(chip, rows, say, save, dry)
    if dry:
        made.correctness(None, only)
        made.measure(None)
    else:
        with Workers() as pool:
            made.correctness(pool, only)
            made.compile_plans(pool)
        with Workers(1) as alone:
            made.measure(alone)
            made.thorough(alone)
    made.keep()
    return made.found


def write(folder: Path, found: dict[str, Any]) -> None:
    """`gpu.json` and `gpu.md`, each of them as a whole or not at all."""
    for name, text in (("gpu.json", json.dumps(found, indent=1) + "\n"), ("gpu.md", report.markdown(found))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def draw(folder: Path, found: dict[str, Any], rows: Sequence[Row], say: Say = print) -> None:
    """`gpu.png`, where something was measured."""
    named = {row.name: row for row in rows}
    points = [(r["name"], named[r["name"]].flops / named[r["name"]].bytes, r["tflops"]) for r in found["table"]
              if "tflops" in r]  # fmt: skip
    result = attempt(lambda: {"note": report.roofline(found, points, folder / "gpu.png")})
    if result["note"]:
        say(result["note"])


def _say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """Run, print, write. The status is 1 if any call was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", help="folder that receives gpu.json, gpu.md and gpu.png")
    parser.add_argument(
        "--only", action="append", default=[], metavar="SPEC", help="check only this usual spec, or `paths`"
    )
    parser.add_argument("--dry", action="store_true", help="fake tensors, no launch")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out) if arguments.out else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    save = (lambda found: write(folder, found)) if folder else (lambda found: None)
    if arguments.dry:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            found = run(True, rows, arguments.only, _say, save)
    else:
        found = run(False, rows, arguments.only, _say, save)
    if folder:
        draw(folder, found, rows)
    return 1 if any(c["ok"] is False for c in found["correctness"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
