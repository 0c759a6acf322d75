"""The report of a GPU run as a page and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FIGURES = ("ms", "tflops", "bandwidth", "floor", "times_sdpa", "times_flex")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    checks = report["correctness"]
    wrong, right = [c for c in checks if c["ok"] is False], [c for c in checks if c["ok"]]
    late = len(checks) - len(wrong) - len(right)
    roof = report["roof"]
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        f"`{report['command']}`, torch {report['torch']}, Triton {report['triton']}, attnopt {report['attnopt']}; "
        f"{report['seconds']:.0f} s.",
        f"{len(right)} of {len(checks)} calls right, {len(wrong)} wrong{f', {late} left out' if late else ''}.",
        *([] if not roof else [
            f"Measured: {roof['flops'] / 1e12:.0f} TFLOP/s of bf16 products, {roof['bytes'] / 1e12:.2f} TB/s of copies."
        ]),
        "",
        *(f"- wrong: {c['spec']} {c['kind']} {c['dtype']} width {c['width']} {c['sizes']}: {c['note']}" for c in wrong),
        *([""] if wrong else []),
        "Bandwidth and floor are shares of what the chip allows; times are how often faster than the best of PyTorch's",
        "kernels and than FlexAttention.",
        "",
        "| attention | ms | TFLOP/s | bandwidth | floor | x SDPA | x flex | target | met | plan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [_line(row) for row in report["table"]]
    lines += [
        "",
        "| attention | flash ms | cuDNN ms | efficient ms | flex ms | flex tuned ms | operators ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["table"]:
        others = row.get("rivals")
        if others:
            names = ("flash", "cudnn", "efficient", "flex", "flex tuned", "operators")
            lines.append(f"| {row['name']} | {' | '.join(cell(others.get(x)) for x in names)} |")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    if "ms" not in row:
        return f"| {row['name']} | {row['note']} | | | | | | | | |"
    targets = row.get("targets", ())
    met = ["?" if t["met"] is None else "yes" if t["met"] else "no" for t in targets]
    said = "; ".join(t["target"] for t in targets)
    figures = [cell(row.get(x)) for x in _FIGURES]
    return f"| {' | '.join([row['name'], *figures, said, '; '.join(met), row.get('plan', '')])} |"


def cell(value: Any) -> str:
    """A figure with three digits, a reason shortened, nothing for None."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:40].replace("|", "/")


def roofline(report: Mapping[str, Any], points: Sequence[tuple[str, float, float]], path: Path) -> str:
    """Draw `(name, FLOP per byte, TFLOP/s)` under the measured roof; what is missing, in words, else nothing."""
    roof = report["roof"]
    if not roof or not points:
        return "no picture: nothing was measured"
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no picture: matplotlib is not installed (attnopt[bench])"
    figure, axes = plt.subplots(figsize=(9, 6))
    knee = roof["flops"] / roof["bytes"]
    ends = [min(1.0, min(x for _, x, _ in points)) / 2, max(knee, max(x for _, x, _ in points)) * 4]
    xs = [ends[0], knee, ends[1]]
    axes.loglog(xs, [min(roof["flops"], x * roof["bytes"]) / 1e12 for x in xs], color="black", label="measured roof")
    for name, x, y in points:
        axes.loglog([x], [y], "o")
        axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title=f"{report['device']}, {report['date']}, bf16")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return ""
