"""The `coverage` sub-command: run the zoo, then write the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError

VARIANTS = ("eager", "sdpa", "decode", "decode-static")


def register(commands: Any) -> None:
    """Add the sub-command to the parser."""
    parser = commands.add_parser("coverage", help="optimise every architecture of transformers and diffusers, small")
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME", help="only this architecture; may be repeated")
    add("--variant", action="append", default=[], choices=VARIANTS, help="only this variant; may be repeated")
    add("--jobs", type=int, default=2, metavar="N", help="rows at a time (2)")
    add("--seconds", type=float, default=120.0, metavar="S", help="limit of one row (120)")
    add("--kernel", default="auto", help="as the option of that name (auto)")
    add("--inductor", action="store_true", help="also count what Inductor's own matcher fuses; slower")
    add("--folder", default="build/coverage", metavar="DIR", help="rows, one file each (build/coverage)")
    add("--again", action="store_true", help="run rows that the folder already has")
    add("--retry", action="store_true", help="run rows that the folder has but that are not settled")
    add("--report", metavar="PATH", help="write the Markdown report, such as docs/coverage.md")
    add("--json", metavar="PATH", help="write the figures as JSON, such as benchmarks/results/coverage.json")
    parser.set_defaults(run=coverage)


def coverage(arguments: argparse.Namespace) -> int:
    """Run what is asked; 1 if a site was missed or may have been, is declined without explanation, or is outside."""
    from attnopt.coverage import run
    from attnopt.coverage.catalogue import architectures
    from attnopt.coverage.show import Progress, summary

    known = architectures()
    for name in arguments.only:
        if name not in known:
            raise OptionError(f"there is no architecture {name!r}: a model_type of transformers or diffusers:CLASS.")
    rows = tuple((a, v) for v in arguments.variant or VARIANTS for a in arguments.only or known)
    if arguments.inductor:
        rows += tuple((a, "inductor") for a in arguments.only or known)
    plan = run.Plan(rows, Path(arguments.folder), arguments.jobs, arguments.seconds, kernel=arguments.kernel)
    todo = list(rows) if arguments.again else run.pending(plan, arguments.retry)
    start = time.perf_counter()
    with Progress(len(todo)) as progress:
        for row in run.run(plan, todo):
            progress.row(row)
    wanted = set(rows)
    done = [r for r in run.load(plan.folder) if (r["architecture"], r["variant"]) in wanted]
    print(summary(done, time.perf_counter() - start if todo else None))
    return _write(arguments, done)


def _write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    from attnopt.coverage.report import to_json, to_markdown
    from attnopt.coverage.totals import Totals

    for path, make in ((arguments.report, to_markdown), (arguments.json, to_json)):
        if path:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(make(rows), encoding="utf-8")
            print(f"written: {path}")
    totals = Totals.of(rows)
    return 1 if totals.missed or totals.unknown or totals.unexplained or totals.outside else 0
