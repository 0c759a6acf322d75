"""What each rewrite costs in quality and saves in parameters, KV cache and time, before and after healing.

    python -m benchmarks.quality --out benchmarks/results            # the table, as JSON and Markdown, and one picture
    python -m benchmarks.quality --only ShareKV --subjects lm --steps 20

Subjects: the trained language model of `benchmarks/subject` (quality is its held-out loss, nats a byte) and MiniLM with
its real weights (quality is the mean cosine of sentence embeddings with the original's). Every rewrite gets the same
budget of healing. Times are medians, interleaved with the original's in one process; at 8k tokens only times are
taken. A new rewrite is one more row of `ROWS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import attnopt
from attnopt import rewrites
from attnopt.errors import AttnoptError
from attnopt.spec import Softmax
from benchmarks.subjects import Subject, language_model, minilm

ANY = rewrites.Tolerance(output=1e9)  # the table is to show what does not pay, too


@dataclass(frozen=True)
class Row:
    """One rewrite at one strength: its class in `attnopt.rewrites`, and arguments."""

    rewrite: str
    strength: str
    arguments: Mapping[str, Any]
    positional: tuple[Any, ...] = ()
    subjects: tuple[str, ...] = ("lm", "minilm")
    steps: int = 1  # times the budget of healing

    def make(self) -> Any:
        """The rewrite, or None where this version does not have it."""
        found = getattr(rewrites, self.rewrite, None) if self.rewrite in rewrites.__all__ else None
        return None if found is None else found(*self.positional, **self.arguments)


ROWS = (
    Row("ShareKV", "4 of 8, mean", {"method": "mean"}, (4,), ("lm",)),
    Row("ShareKV", "4 of 8, aligned", {"method": "aligned"}, (4,), ("lm",)),
    Row("ShareKV", "2 of 8, aligned", {"method": "aligned"}, (2,), ("lm",)),
    Row("ShareKV", "6 of 12, mean", {"method": "mean"}, (6,), ("minilm",)),
    Row("ShareKV", "6 of 12, aligned", {"method": "aligned"}, (6,), ("minilm",)),
    Row("PruneHeads", "a quarter", {"fraction": 0.25, "score": "magnitude"}),
    Row(
        "Linearize",
        "hedgehog, window 128",
        {"feature": "hedgehog", "window": 128, "steps": 60, "length": 8192},
        (),
        ("lm",),
    ),
    Row("Linearize", "hedgehog", {"feature": "hedgehog", "steps": 60, "length": 8192}, (), ("minilm",)),
    Row("Sparsify", "window 256, 4 sinks", {"method": "window", "window": 256, "always": True}, (), ("lm",)),
    Row("Sparsify", "4 blocks of 64", {"method": "blocks", "top": 4, "always": True}, (), ("lm",)),
    Row("Sparsify", "blocks of mass 0.9", {"method": "blocks", "mass": 0.9, "always": True}, (), ("lm",)),
    Row("Sparsify", "window 64", {"method": "window", "window": 64, "always": True}, (), ("minilm",)),
    Row("MixHeads", "2 shared, 4 active", {"shared": 2, "active": 4}, (), ("lm",)),
    Row("MixHeads", "2 shared, 4 active, linear", {"shared": 2, "active": 4, "router": "linear"}, (), ("lm",)),
    Row("FactorBias", "0.01", {"tolerance": 0.01}, (), ()),  # neither subject has a bias to factor
)


@dataclass(frozen=True)
class Figures:
    """One line of the table; `quality` is nats a byte or a cosine, times in milliseconds."""

    subject: str
    rewrite: str
    strength: str
    sites: int
    quality: float | None
    healed: float | None
    parameters: int
    kv_bytes: int
    ms: Mapping[str, float]
    original_ms: Mapping[str, float]
    note: str = ""


SUBJECTS: dict[str, Callable[[], Subject]] = {"lm": language_model, "minilm": minilm}


def measure(row: Row, at: Subject, steps: int, repeats: int) -> Figures | str:
    """One line of the table, or why there is none."""
    rewrite = row.make()
    if rewrite is None:
        return "not in this version"
    try:
        fast = attnopt.optimize(
            at.model, (), at.example, rewrites=[rewrite], tolerance=ANY, calibration=at.calibration,
            dynamic_shapes=at.shapes, validate=False,
        )  # fmt: skip
    except AttnoptError as error:
        return f"{type(error).__name__}: {error}"
    done = fast.report.figures.get(rewrite.name, {})
    if not fast.report.rewritten:
        return "; ".join(fast.report.notes[:2]) or "no site was rewritten"
    before = at.quality(fast)
    try:
        healed = attnopt.heal(fast, at.model, at.data, steps * row.steps, lr=at.lr, loss=at.loss, progress=False)
        after, note = at.quality(healed), ""
    except (AttnoptError, RuntimeError) as error:
        after, note = None, f"not healed: {error}".splitlines()[0]
    ours, original = timings(fast, at, repeats)
    return Figures(
        at.name, row.rewrite, row.strength, int(done.get("sites", 0)), before, after,
        sum(p.numel() for p in fast.parameters()), kv_bytes(fast), ours, original, note,
    )  # fmt: skip


def kv_bytes(fast: nn.Module) -> int:
    """Bytes of keys and values that a token leaves in an fp32 cache; linear attention keeps a state of fixed size."""
    specs = [site.spec for site in fast.report.sites if site.spec is not None]
    heads = [spec.heads for spec in specs if isinstance(spec.normalizer, Softmax)]
    return sum(4 * (h.k * h.d_qk + h.v * h.d_v) for h in heads)


@torch.no_grad()
def timings(fast: nn.Module, at: Subject, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds a call by length, of the rewritten model and of the plain optimised one, interleaved."""
    plain = baseline(at)
    ours: dict[str, float] = {}
    original: dict[str, float] = {}
    for length in at.lengths:
        given = at.timed(length)
        seen: tuple[list[float], list[float]] = ([], [])
        turns = repeats if length < 4096 else 1
        for turn in range(turns):
            for model, times in zip((fast, plain), seen, strict=True):
                started = time.perf_counter()
                model(**given)
                if turn or turns == 1:  # the first of several calls warms up
                    times.append(1e3 * (time.perf_counter() - started))
        ours[str(length)], original[str(length)] = (statistics.median(times) for times in seen)
    return ours, original


_BASELINES: dict[str, nn.Module] = {}


def baseline(at: Subject) -> nn.Module:
    """The subject with exact rewrites alone: what a rewrite has to beat."""
    if at.name not in _BASELINES:
        _BASELINES[at.name] = attnopt.optimize(at.model, (), at.example, dynamic_shapes=at.shapes, validate=False)
    return _BASELINES[at.name]


def table(name: str, lines: Sequence[Figures], declined: Mapping[str, str]) -> str:
    """The Markdown of one subject."""
    lengths = list(lines[0].ms)
    head = ["rewrite", "strength", "held-out loss" if name == "lm" else "cosine", "healed", "parameters"]
    head += ["KV bytes a token", *(f"ms at {n} tokens (times the exact one's)" for n in lengths)]
    rows = [head, ["---"] * len(head)]
    for x in lines:
        healed = "–" if x.healed is None else f"{x.healed:.4f}"
        cells = [x.rewrite, x.strength, f"{x.quality:.4f}", healed, f"{x.parameters:,}", f"{x.kv_bytes:,}"]
        rows.append([*cells, *(f"{x.ms[n]:.0f} ({x.ms[n] / x.original_ms[n]:.2f})" for n in lengths)])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"
    notes = [f"{x.rewrite} ({x.strength}): {x.note}" for x in lines if x.note]
    notes += [f"{rewrite}: left out, {why}" for rewrite, why in declined.items()]
    return text + "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")


def picture(path: Path, found: Mapping[str, Sequence[Figures]]) -> None:
    """Quality over the KV cache, before and after healing. Needs matplotlib, of the extra `bench`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(6.4 * len(found), 4.4), squeeze=False)
    for axis, (name, (first, *lines)) in zip(axes[0], found.items(), strict=True):
        axis.axhline(first.quality, color="0.6", linewidth=1, label="exact")
        for i, x in enumerate(lines):
            at, color = x.kv_bytes / 1024, f"C{i}"
            axis.plot([at], [x.quality], "o", color=color, fillstyle="none")
            axis.plot(
                [at],
                [x.quality if x.healed is None else x.healed],
                "o",
                color=color,
                label=f"{x.rewrite}, {x.strength}",
            )
            if x.healed is not None:
                axis.annotate("", (at, x.healed), (at, x.quality), arrowprops={"arrowstyle": "->", "color": color})
        axis.set_xlabel("KV cache, KiB a token")
        axis.set_ylabel("held-out loss, nats a byte" if name == "lm" else "cosine with the original's embeddings")
        axis.set_title(f"{name}: open before healing, filled after")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=40, help="healing budget, updates")
    parser.add_argument("--repeats", type=int, default=4, help="timed calls at short lengths, the first left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--only", default="", help="rewrites whose name holds this")
    parser.add_argument("--no-picture", action="store_true")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.subjects:
        at = SUBJECTS[name]()
        rows = [r for r in ROWS if name in r.subjects and asked.only in r.rewrite]
        ours, original = timings(baseline(at), at, asked.repeats)
        size = sum(p.numel() for p in at.model.parameters())
        kv, quality = kv_bytes(baseline(at)), at.quality(at.model)
        lines, declined = [Figures(name, "none", "exact", 0, quality, None, size, kv, ours, original)], {}
        for row in tqdm(rows, desc=name):
            line = measure(row, at, asked.steps, asked.repeats)
            if isinstance(line, str):
                declined[f"{row.rewrite} ({row.strength})"] = line
            else:
                lines.append(line)
            write(asked, name, at.title, lines, declined)
    return 0


def write(
    asked: argparse.Namespace, name: str, title: str, lines: Sequence[Figures], declined: Mapping[str, str]
) -> None:  # fmt: skip
    """What was measured of one subject so far, beside what is on disk of the others."""
    path = asked.out / "quality.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    about = {"torch": torch.__version__, "threads": asked.threads, "steps": asked.steps, "title": title}
    held[name] = {"about": about, "rows": [asdict(x) for x in lines], "left out": dict(declined)}
    path.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
    text = (
        "# Quality of rewrites\n\n`python -m benchmarks.quality`. Times are of the forward before healing; in brackets "
    )
    text += "against the model with exact rewrites alone, interleaved in one process.\n"
    found = {n: [Figures(**row) for row in x["rows"]] for n, x in sorted(held.items())}
    for n, x in sorted(held.items()):
        text += f"\n## {x['about']['title']}\n\n{table(n, found[n], x['left out'])}"
        about = x["about"]
        text += f"\nHealing: {about['steps']} updates. {about['threads']} thread(s), torch {about['torch']}.\n"
    (asked.out / "quality.md").write_text(text)
    if not asked.no_picture:
        picture(asked.out / "quality.png", found)


if __name__ == "__main__":
    raise SystemExit(main())
