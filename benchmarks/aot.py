"""What the compiler says of the Triton kernels, chip by chip, on a machine that has none of them.

    python benchmarks/aot.py --out benchmarks/results                     # every usual spec, its default plans
    python benchmarks/aot.py --out benchmarks/results --plans             # every plan of every width instead
    python benchmarks/aot.py --out DIR --arch sm_90 --kind forward        # a part; parts of one folder are joined

Rows that `aot.json` has already, made by the same versions, are not compiled again. The exit status is 1 if a kernel
does not fit its chip, spills more than `SPILLS` bytes a thread, or has products that run on no tensor core.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attnopt._version import VERSION
from attnopt.aot.standard import layout_for, standard
from attnopt.codegen.triton import TritonKernel
from attnopt.codegen.triton_fit import chosen
from attnopt.codegen.triton_kinds import EMIT, proposed
from attnopt.codegen.triton_plans import CHIPS, Chip, TritonPlan, extra_plans
from attnopt.errors import AttnoptError, SpecError
from attnopt.runtime.triton_compile import PRODUCTS, Compiled, compile_entry, triton_version
from attnopt.spec import AttentionSpec, Heads

# Bytes of a thread's stack that a plan of the tables may use, and vector registers on AMD.
SPILLS = 256
# Kernels without a product of matrices.
WITHOUT_PRODUCTS = ("attention_combine", "attention_delta", "attention_rows", "linear_scan")
WIDTHS = (64, 128, 256)
# What identifies a job.
Key = tuple[Any, ...]
# The spec that stands for all others where every plan is compiled.
USUAL = {"linear": "linear"}


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    name: str
    spec: AttentionSpec
    kind: str
    chip: Chip
    dtype: str
    plan: TritonPlan

    @property
    def about(self) -> dict[str, Any]:
        """What identifies it."""
        heads = self.spec.heads
        return {"spec": self.name, "kind": self.kind, "arch": self.chip.name, "dtype": self.dtype,
                "width": max(heads.d_qk, heads.d_v), "plan": str(self.plan)}  # fmt: skip


def jobs(chips: Sequence[str], kinds: Sequence[str], every_plan: bool, only: Sequence[str] = ()) -> Iterator[Job]:
    """The usual specs with their default plans, or every plan for one of each kind."""
    widths, dtypes = (WIDTHS, ("bfloat16", "float32")) if every_plan else ((128,), ("bfloat16",))
    for chip in (CHIPS[name] for name in chips):
        for kind in kinds:
            wanted = only or ((USUAL.get(kind, "causal"),) if every_plan else ())
            for width in widths:
                for name, spec in standard(Heads(32, 8, 8, width, width)):
                    if wanted and name not in wanted:
                        continue
                    for dtype in dtypes:
                        plans = proposed(kind, spec, chip, dtype)
                        if not plans or _declined(spec, dtype, kind, plans[0]):
                            continue
                        more = chosen(extra_plans(chip, dtype, width, width, kind), spec, chip, dtype, kind)
                        for plan in (*plans, *more) if every_plan else plans[:1]:
                            yield Job(name, spec, kind, chip, dtype, plan)


def _declined(spec: AttentionSpec, dtype: str, kind: str, plan: TritonPlan) -> bool:
    """Whether there is no such kernel for the spec."""
    try:
        EMIT[kind](spec, layout_for(spec, dtype), plan)
    except SpecError:
        return True
    return False


def compiled(job: Job) -> list[dict[str, Any]]:
    """A row for each kernel of the job."""
    try:
        kernel = EMIT[job.kind](job.spec, layout_for(job.spec, job.dtype), job.plan)
        return [job.about | _row(kernel, compile_entry(kernel, entry, job.chip)) for entry in kernel.entries]
    except AttnoptError as error:
        return [job.about | {"entry": "", "problem": str(error)}]


def _row(kernel: TritonKernel, made: Compiled) -> dict[str, Any]:
    return {"entry": made.entry, "shared": made.shared, "registers": made.registers, "spills": made.spills,
            "instructions": dict(made.instructions), "problem": _problem(made), "text": kernel.key}  # fmt: skip


def _problem(made: Compiled) -> str:
    if made.problem:
        return made.problem
    if made.spills is not None and made.spills > SPILLS:
        return f"spills {made.spills}"
    if made.entry not in WITHOUT_PRODUCTS and not any(made.instructions.get(x) for x in PRODUCTS.values()):
        return "no product runs on a tensor core"
    return ""


def markdown(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The rows as a page."""
    bad = [row for row in rows if row["problem"]]
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"{about['date']}, attnopt {about['attnopt']}, Triton {about['triton']}: `{about['command']}`.",
        f"{len(rows)} kernels, {len(bad)} with a problem. Spills are bytes of a thread's stack, on gfx942 registers.",
        *([_unfinished(about)] if about["left"] else []),
        "",
        "| spec | kernel | arch | dtype | width | plan | registers | spills | shared KiB | products | async copies |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = [row["spec"], (row["entry"] or row["kind"]).removeprefix("attention_"), row["arch"], row["dtype"]]
        cells = [*head, str(row["width"]), row["plan"], *_figures(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _unfinished(about: Mapping[str, Any]) -> str:
    left, whole = about["left"], about["left"] + about["done"]
    return f"{left} of {whole} files of kernels are not compiled yet; the command goes on where it stopped."


def _figures(row: dict[str, Any]) -> list[str]:
    if "shared" not in row:
        return [row["problem"], "", "", "", ""]
    found = row["instructions"]
    products = ", ".join(f"{found[x]} {x}" for x in dict.fromkeys(PRODUCTS.values()) if found.get(x))
    spills = "?" if row["spills"] is None else str(row["spills"])
    problem = f" ({row['problem']})" if row["problem"] else ""
    copies = str(found.get("cp.async", 0))
    return [str(row["registers"] or "?"), spills, f"{row['shared'] / 1024:.1f}", products + problem, copies]


def known(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same versions."""
    if not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    same = report["attnopt"] == VERSION and report["triton"] == triton_version()
    return list(report["rows"]) if same else []


def _identity(row: dict[str, Any]) -> Key:
    return tuple(row[x] for x in ("spec", "kind", "arch", "dtype", "width", "plan"))


@functools.lru_cache(maxsize=2)
def _everything(every_plan: bool) -> tuple[Key, ...]:
    """All jobs of a table, in its order."""
    return tuple(_identity(job.about) for job in jobs(tuple(CHIPS), tuple(EMIT), every_plan))


def _current(job: Job, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether these rows are of the text that is generated now."""
    try:
        text = EMIT[job.kind](job.spec, layout_for(job.spec, job.dtype), job.plan).key
    except AttnoptError:
        return False
    return bool(rows) and all(row.get("text") == text for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a line for each kernel, write both files after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder that receives aot.json and aot.md")
    parser.add_argument("--arch", action="append", choices=sorted(CHIPS), help="may be repeated (all)")
    parser.add_argument("--kind", action="append", choices=sorted(EMIT), help="may be repeated (all)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this usual spec")
    parser.add_argument("--plans", action="store_true", help="every plan, at every width; aot_plans.json and .md")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = "aot_plans" if arguments.plans else "aot"
    path = folder / f"{stem}.json"
    found: dict[Key, list[dict[str, Any]]] = {}
    everything = _everything(arguments.plans)
    for row in known(path):
        if _identity(row) in everything:  # not of a plan that is proposed no more
            found.setdefault(_identity(row), []).append(row)
    wanted = jobs(arguments.arch or tuple(CHIPS), arguments.kind or tuple(EMIT), arguments.plans, arguments.only)
    for job in wanted:
        key = _identity(job.about)
        if not _current(job, found.get(key, [])):
            found[key] = compiled(job)
            _write(folder, stem, found, everything, arguments.plans)
        for row in found[key]:
            print(*key, row["entry"].removeprefix("attention_"), *_figures(row)[:4], sep="  ", flush=True)
    _write(folder, stem, found, everything, arguments.plans)
    return 1 if any(row["problem"] for rows in found.values() for row in rows) else 0


def _write(
    folder: Path, stem: str, found: Mapping[Key, list[dict[str, Any]]], everything: Sequence[Key], every_plan: bool
) -> None:
    """Both files, rows in the order of the jobs, whatever order they were compiled in."""
    order = dict.fromkeys((*everything, *found))
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/aot.py --out benchmarks/results{' --plans' if every_plan else ''}",
        "attnopt": VERSION,
        "triton": triton_version(),
        "done": len(found),
        "left": len(order) - len(found),
        "chips": {name: asdict(chip) for name, chip in CHIPS.items()},
    }
    rows = [row for key in order for row in found.get(key, ())]
    (folder / f"{stem}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(rows, about), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
