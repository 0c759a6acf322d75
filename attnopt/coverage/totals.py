"""Sums over rows: sites, fused, declined by reason, missed, and the largest error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.coverage.explained import explain
from attnopt.coverage.kinds import kind

Row = Mapping[str, Any]

MOST_UNITS = 3.0
"""Above this many times eager's own error a row is outside: no order of summation in attention alone explains it."""
MOST_FP64 = 1e-9
"""Relative change in fp64 that rounding can explain."""


def generic(reason: str) -> str:
    """The first line of a reason without the node at which it stopped, so that equal reasons add up."""
    first = re.sub(r" \(at %[\w.]+\)$", "", reason).split("\n")[0][:200]
    return re.sub(r"%\w+", "%…", first)


def outside(row: Row) -> str:
    """Why the row's outputs are not what they should be; empty if they are."""
    figures = row.get("errors") or {}
    if figures.get("astray") or figures.get("fp64_astray"):
        return "numbers where eager has none, or the reverse"
    if figures.get("fp64") is not None and figures["fp64"] > MOST_FP64:
        return f"the outputs move by {figures['fp64']:.1e} in fp64"
    if figures.get("units") is not None and figures["units"] > MOST_UNITS:
        return f"{figures['units']:.1f} times eager's error"
    if figures.get("units") is None and figures.get("change", 1.0) > 1e-3:
        return f"the outputs cannot be compared: {figures.get('why', figures.get('golden', 'not finite'))}"
    return ""


@dataclass
class Totals:
    """Figures of a set of rows."""

    rows: int = 0
    built: set[str] = field(default_factory=set)
    unbuilt: dict[str, str] = field(default_factory=dict)
    architectures: set[str] = field(default_factory=set)
    sites: int = 0
    fused: int = 0
    missed: int = 0
    unknown: int = 0
    others: int = 0
    strangers: int = 0
    unexplained: int = 0
    crashed: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    outside: list[Row] = field(default_factory=list)
    units: float = 0.0
    worst: str = ""
    fp64: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)
    worst_by_kernel: dict[str, tuple[float, str]] = field(default_factory=dict)
    inductor: int = 0
    inductor_models: int = 0
    inductor_sites: int = 0
    inductor_ours: int = 0

    @staticmethod
    def of(rows: Sequence[Row]) -> Totals:
        """Add up the rows."""
        totals = Totals()
        counted = {}
        for row in rows:
            if row["variant"] == "inductor":
                counted[row["architecture"]] = row
            else:
                totals.add(row)
        for row in rows:
            count = counted.get(row["architecture"], {}).get("fused")
            if row["variant"] == "eager" and row["status"] == "measured" and isinstance(count, int):
                beside = Totals()
                beside.add(row)
                totals.inductor += count
                totals.inductor_models += 1
                totals.inductor_sites += beside.sites
                totals.inductor_ours += beside.fused
        totals.unbuilt = {a: why for a, why in totals.unbuilt.items() if a not in totals.built}
        return totals

    def add(self, row: Row) -> None:
        """Add one row."""
        self.rows += 1
        self.architectures.add(row["architecture"])
        if row["status"] in ("not built", "crashed", "not captured"):
            self.crashed += row["status"] != "not built"
            if row["variant"] == "eager":
                self.unbuilt.setdefault(row["architecture"], row["reason"])
        if row["status"] != "measured":
            return
        self.built.add(row["architecture"])
        fused = [s for s in row["sites"] if s["status"] == "fused"]
        declined = [s for s in row["sites"] if s["status"] != "fused"]
        strangers = [s for s in declined if (found := explain(row, s)) is not None and not found.attention]
        self.sites += len(row["sites"]) + len(row["missed"]) - len(strangers)
        self.fused += len(fused)
        self.missed += len(row["missed"])
        self.unknown += sum(graph["normalizers"] > 0 for graph in row.get("unknown", ()))
        self.others += row["others"] + len(strangers)
        self.strangers += len(strangers)
        self.declined.update(generic(s["reason"]) for s in declined if s not in strangers)
        self.unexplained += sum(explain(row, s) is None for s in declined)
        self.kinds.update(kind(s, row["variant"]) for s in fused)
        self._errors(row)

    def _errors(self, row: Row) -> None:
        figures, kernel = row["errors"], row.get("kernel", "reference")
        if outside(row):
            self.outside.append(row)
            return
        self.kernels[kernel] += 1
        found = figures.get("units") or 0.0, f"{row['architecture']} {row['variant']}"
        self.worst_by_kernel[kernel] = max(self.worst_by_kernel.get(kernel, (0.0, "")), found)
        self.units, self.worst = max(self.worst_by_kernel.values())
        self.fp64 = max(self.fp64, figures.get("fp64") or 0.0)
