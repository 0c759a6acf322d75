"""The tables as text, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from attnopt.bench.costs import Cost
from attnopt.bench.measure import Result
from attnopt.errors import OptionError

_HEAD = ("case", "kernel", "ms", "vs SDPA", "vs Flex", "vs own", "of peak", "Flex", "of read", "target", "met")
_COST_HEAD = ("cost", "measured", "at most", "met")


def cells(result: Result) -> tuple[str, ...]:
    """One row of the table."""
    ratios = [f"{result.ratios[name]:.2f}x" if name in result.ratios else "-" for name in ("sdpa", "flex", "own")]
    wanted = ", ".join(
        f"{name} {value:.0%}" if name in result.shares else f"{name} {value:g}x"
        for name, value in result.targets.items()
    )
    met = "" if not result.targets else "yes" if result.met else "no"
    if result.targets.get("flex", 0.0) > result.bound:
        met = f"no: {result.bound:.2f}x is the peak"
    shares = [f"{result.shares[name]:.0%}" if name in result.shares else "-" for name in ("peak", "flex peak", "read")]
    return (result.name, result.kernel, f"{result.times['attnopt']:.3f}", *ratios, *shares, wanted, met)


def cost_cells(cost: Cost) -> tuple[str, ...]:
    """One row of the table of costs."""
    return (cost.name, f"{cost.value:.3g} {cost.unit}", f"{cost.limit:g} {cost.unit}", "yes" if cost.met else "no")


def line(values: Sequence[str]) -> str:
    """A row for the terminal, of either table."""
    widths = (22, 9, 9, 8, 8, 8, 8, 6, 8, 22, 22) if len(values) == len(_HEAD) else (40, 12, 12, 4)
    return " ".join(f"{value:<{width}}" for value, width in zip(values, widths, strict=True)).rstrip()


def head() -> str:
    """The first line for the terminal."""
    return line(_HEAD)


def cost_head() -> str:
    """The first line of the table of costs."""
    return line(_COST_HEAD)


def markdown(results: Sequence[Result], about: str, costs: Sequence[Cost] = ()) -> str:
    """The tables for a page."""
    parts = [about]
    for top, rows in ((_HEAD, [cells(r) for r in results]), (_COST_HEAD, [cost_cells(c) for c in costs])):
        if rows:
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in (top, ("---",) * len(top), *rows)))
    return "\n\n".join(parts) + "\n"


def write_json(results: Sequence[Result], about: str, path: Path, costs: Sequence[Cost] = ()) -> None:
    """Every figure, and the machine it was taken on."""
    data = {"about": about, "rows": [{**asdict(result), "met": result.met} for result in results]}
    data["costs"] = [{**asdict(cost), "met": cost.met} for cost in costs]
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def plot(results: Sequence[Result], about: str, path: Path) -> None:
    """Bars of the speed against `scaled_dot_product_attention`. Raises `OptionError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a picture needs matplotlib; install it, or leave --plot away.") from error
    rows = [r for r in results if "sdpa" in r.ratios][::-1]
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([r.name for r in rows], [r.ratios["sdpa"] for r in rows], color="#3465a4")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as scaled_dot_product_attention (logarithmic)")
    axes.set_title(about, fontsize=8)
    figure.savefig(path, dpi=120)
