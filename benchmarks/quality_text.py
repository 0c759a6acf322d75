"""The figures of `benchmarks.quality` as JSON, as Markdown and as one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cells = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figures:
    """One line of the table; `quality` is nats a byte or a cosine, times in milliseconds.

    `original_ms` are the times of the model with exact rewrites alone, interleaved; `code` is what made the line.
    """

    subject: str
    rewrite: str
    strength: str
    sites: int
    quality: float
    healed: float | None
    parameters: int
    kv_bytes: int
    ms: Mapping[str, float]
    original_ms: Mapping[str, float]
    note: str = ""
    code: str = ""

    def ratio(self, length: str) -> float:
        """Its time as a multiple of the exact model's."""
        return self.ms[length] / self.original_ms[length]


@dataclass(frozen=True)
class BiasFigures:
    """One line of the table of biases; `reason`, if there is one, is why `when="pays"` leaves the bias as it is."""

    model: str
    strength: str
    sites: int
    dimensions: str
    change: float
    parameters: int
    before: int
    ms: float
    original_ms: float
    reason: str = ""


def held(out: Path) -> dict[str, Any]:
    """What was measured before."""
    path = out / "quality.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(out: Path, fresh: Mapping[str, Any], picture: bool = False) -> None:
    """Put fresh results beside those of other subjects, as JSON and Markdown, and draw the picture if asked to."""
    found = held(out) | dict(fresh)
    (out / "quality.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    text = (
        "# Quality of rewrites\n\n`python -m benchmarks.quality`. Times are medians of the forward before healing; in "
    )
    text += "brackets against the model with exact rewrites alone, interleaved in one process.\n"
    lines = {n: [Figures(**row) for row in x["rows"]] for n, x in sorted(found.items()) if n != "bias"}
    for name, rows in lines.items():
        about = found[name]["about"]
        text += f"\n## {about['title']}\n\n{table(name, rows, found[name]['left out'])}"
        text += f"\nHealing: {about['steps']} updates. {about['threads']} thread(s), torch {about['torch']}.\n"
    if "bias" in found:
        about = found["bias"]["about"]
        text += f"\n## Biases of the scores\n\n{bias_table([BiasFigures(**row) for row in found['bias']['rows']])}"
        text += f"\n{about['threads']} thread(s), torch {about['torch']}; no healing.\n"
    (out / "quality.md").write_text(text)
    if picture:
        draw(out / "quality.png", lines)


def grid(head: Sequence[str], rows: Cells) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def table(name: str, lines: Sequence[Figures], declined: Mapping[str, str]) -> str:
    """The Markdown of one subject, and where its rewrites do not pay."""
    lengths = list(lines[0].ms)
    head = ["rewrite", "strength", "held-out loss" if name == "lm" else "cosine", "healed", "parameters"]
    head += ["KV bytes a token", *(f"ms at {int(n):,} tokens (times the exact one's)" for n in lengths)]
    rows = []
    for x in lines:
        healed = "–" if x.healed is None else f"{x.healed:.4f}"
        cells = [x.rewrite, x.strength, f"{x.quality:.4f}", healed, f"{x.parameters:,}", f"{x.kv_bytes:,}"]
        rows.append([*cells, *(f"{x.ms[n]:.0f} ({x.ratio(n):.2f})" for n in lengths)])
    return grid(head, rows) + "".join(f"\n- {note}" for note in notes(lines, declined)) + "\n"


def notes(lines: Sequence[Figures], declined: Mapping[str, str]) -> list[str]:
    """What is worth knowing: remarks, each once, what is not faster, what was left out."""
    remarks: dict[str, list[str]] = {}
    for x in lines:
        if x.note:
            remarks.setdefault(x.note, []).append(f"{x.rewrite} ({x.strength})")
    found = [f"{', '.join(whom)}: {note}" for note, whom in remarks.items()]
    for n in lines[0].ms:
        slow = [f"{x.rewrite} ({x.strength}, {x.ratio(n):.2f})" for x in lines[1:] if x.ratio(n) > 1]
        if slow:
            found.append(f"no faster than the exact model at {int(n):,} tokens: {', '.join(slow)}")
    return found + [f"{rewrite}: left out, {why}" for rewrite, why in declined.items()]


def bias_table(lines: Sequence[BiasFigures]) -> str:
    """The Markdown of the models with biases."""
    head = ["model", "FactorBias", "width of a head", "change of the output", "parameters (before)"]
    head += ["ms (times the exact one's)", '`when="pays"` leaves it, because']
    rows = []
    for x in lines:
        cells = [x.model, x.strength, x.dimensions, f"{x.change:.1e}", f"{x.parameters:,} ({x.before:,})"]
        rows.append([*cells, f"{x.ms:.0f} ({x.ms / x.original_ms:.2f})", x.reason or "by its estimate it pays"])
    slow = [f"{x.model} ({x.strength}, {x.ms / x.original_ms:.2f})" for x in lines if x.ms > x.original_ms]
    return grid(head, rows) + (f"\n- no faster than the exact model: {', '.join(slow)}\n" if slow else "")


def draw(path: Path, found: Mapping[str, Sequence[Figures]]) -> None:
    """Quality over the KV cache and over time, before and after healing. Needs matplotlib, of the extra `bench`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(14, 5.2 * len(found)), squeeze=False, sharey="row")
    for (left, right), (name, (first, *lines)) in zip(axes, found.items(), strict=True):
        length = max(first.ms, key=int)
        for axis, label in ((left, "KV cache, KiB a token"), (right, f"time at {int(length):,} tokens, exact = 1")):
            axis.axhline(first.quality, color="0.6", linewidth=1, label="exact")
            axis.set_xlabel(label)
            axis.set_title(f"{name}: open before healing, filled after")
        for i, x in enumerate(lines):
            color, mark = f"C{i % 10}", "os^D"[i // 10 % 4]
            for axis, at in ((left, x.kv_bytes / 1024), (right, x.ratio(length))):
                axis.plot([at], [x.quality], mark, color=color, fillstyle="none")
                if x.healed is not None:
                    axis.plot([at], [x.healed], mark, color=color, label=f"{x.rewrite}, {x.strength}")
                    axis.annotate("", (at, x.healed), (at, x.quality), arrowprops={"arrowstyle": "->", "color": color})
        left.set_ylabel("held-out loss, nats a byte" if name == "lm" else "cosine with the original's embeddings")
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")
