"""The table as text, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from attnopt.bench.measure import Result
from attnopt.errors import OptionError

_HEAD = ("case", "kernel", "ms", "vs SDPA", "vs Flex", "of peak", "of read rate", "target", "met")


def cells(result: Result) -> tuple[str, ...]:
    """One row of the table."""
    ratio = {name: f"{value:.2f}x" for name, value in result.ratios.items()}
    wanted = ", ".join(
        f"{name} {value:.0%}" if name in result.shares else f"{name} {value:g}x"
        for name, value in result.targets.items()
    )
    met = "" if not result.targets else "yes" if result.met else "no"
    shares = [f"{result.shares[name]:.0%}" for name in ("peak", "read")]
    time = f"{result.times['attnopt']:.3f}"
    return (result.name, result.kernel, time, ratio.get("sdpa", "-"), ratio.get("flex", "-"), *shares, wanted, met)


def line(values: Sequence[str]) -> str:
    """A row for the terminal."""
    widths = (22, 9, 9, 8, 8, 8, 12, 22, 4)
    return " ".join(f"{value:<{width}}" for value, width in zip(values, widths, strict=True)).rstrip()


def head() -> str:
    """The first line for the terminal."""
    return line(_HEAD)


def markdown(results: Sequence[Result], about: str) -> str:
    """The table for a page."""
    rows = [_HEAD, ("---",) * len(_HEAD), *map(cells, results)]
    return f"{about}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_json(results: Sequence[Result], about: str, path: Path) -> None:
    """Every figure, and the machine it was taken on."""
    data = {"about": about, "rows": [{**asdict(result), "met": result.met} for result in results]}
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
