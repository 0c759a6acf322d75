"""What the command prints while it runs and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from attnopt.coverage.totals import Totals, outside


class Progress:
    """A progress bar with the running count of sites."""

    def __init__(self, total: int) -> None:
        text = TextColumn("{task.fields[sites]} sites, {task.fields[fused]} fused  {task.description}")
        self.bar = Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
        self.task = self.bar.add_task("", total=total, sites=0, fused=0)
        self.totals = Totals()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def row(self, row: dict[str, Any]) -> None:
        """One row has ended."""
        if row["variant"] != "inductor":
            self.totals.add(row)
        name = f"{row['architecture']} {row['variant']}"
        self.bar.update(self.task, advance=1, description=name, sites=self.totals.sites, fused=self.totals.fused)
        if not self.bar.console.is_terminal:
            self.bar.console.print(line(row), highlight=False, soft_wrap=True, markup=False)


def line(row: dict[str, Any]) -> str:
    """One row as one line."""
    name = f"{row['architecture']:<32} {row['variant']:<14}"
    if row["status"] == "counted":
        return f"{name} {row['fused']} fused by Inductor's matcher ({row['s']:.1f} s)"
    if row["status"] != "measured":
        return f"{name} {row['status']}: {row['reason']}"
    fused = sum(s["status"] == "fused" for s in row["sites"])
    sites = len(row["sites"]) + len(row["missed"])
    units = row["errors"].get("units")
    more = [f"{fused}/{sites} fused", f"{units:.2f} × eager's error" if units is not None else "not compared"]
    if row["missed"]:
        more.append(f"{len(row['missed'])} missed")
    if row.get("unknown"):
        more.append(f"{len(row['unknown'])} graphs left as they are")
    if outside(row):
        more.append(f"OUTSIDE: {outside(row)}")
    return f"{name} {', '.join(more)} ({row['s']:.1f} s)"


def summary(rows: Sequence[dict[str, Any]], seconds: float | None) -> str:
    """The figures over all rows."""
    totals = Totals.of(rows)
    lines = [
        f"{len(totals.architectures)} architectures, {len(totals.built)} built and measured, {totals.rows} rows",
        f"{totals.sites} sites, {totals.fused} fused, {sum(totals.declined.values())} declined, {totals.missed} missed",
        f"{totals.unknown} graphs left as they are that may hold sites",
        f"{totals.others} softmaxes that are no attention",
        f"largest error {totals.units:.2f} × eager's ({totals.worst or 'nowhere'})",
        f"largest change in fp64 {totals.fp64:.1e}",
    ]
    if totals.inductor_sites:
        lines.append(f"Inductor's matcher on the same graphs: {totals.inductor} of {totals.inductor_sites}")
    lines += [f"  {count:5} declined: {reason}" for reason, count in totals.declined.most_common()]
    lines += [f"  outside: {row['architecture']} {row['variant']}: {outside(row)}" for row in totals.outside]
    if seconds is not None:
        lines.append(f"{seconds:.0f} s")
    return "\n".join(lines)
