"""What each rewrite costs in quality and saves in parameters, KV cache and time, before and after healing.

    python -m benchmarks.quality --out benchmarks/results            # the table, as JSON and Markdown, and one picture
    python -m benchmarks.quality --only ShareKV --subjects lm --steps 20

Subjects: the trained language model of `benchmarks/subject` (quality is its held-out loss, nats a byte) and MiniLM with
its real weights (quality is the mean cosine of sentence embeddings with the original's). Every rewrite gets the same
budget of healing. Times are medians, interleaved with the original's in one process; at 8k tokens only times are
taken. A new rewrite is one more row of `ROWS`; `benchmarks.quality_bias` adds the models whose scores have a bias.

Every line is written as soon as it is measured. A second run takes up what is there: it measures lines that are
missing and those whose request, healing budget or code (the rewrite's own files) is another. `--again` measures all.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import attnopt
from attnopt import healing, rewrites
from attnopt.errors import AttnoptError
from attnopt.spec import Softmax
from benchmarks import quality_bias, quality_text, subjects
from benchmarks.quality_text import Figures
from benchmarks.subjects import Subject, language_model, minilm

ANY = rewrites.Tolerance(output=1e9)  # the table is to show what does not pay, too
_LONG = 4096  # from here on a call takes seconds, and fewer are timed
_TURNS = 3


@dataclass(frozen=True)
class Row:
    """One rewrite at one strength: its class in `attnopt.rewrites`, and arguments."""

    rewrite: str
    strength: str
    arguments: Mapping[str, Any]
    positional: tuple[Any, ...] = ()
    subjects: tuple[str, ...] = ("lm", "minilm")
    note: str = ""

    def make(self) -> Any:
        """The rewrite, or None where this version does not have it."""
        found = getattr(rewrites, self.rewrite, None) if self.rewrite in rewrites.__all__ else None
        return None if found is None else found(*self.positional, **self.arguments)

    def code(self, at: Subject, steps: int) -> str:
        """What the line is made by: the request, the budget of healing, and the text of the rewrite's own files."""
        held = hashlib.sha256(f"{self.positional} {sorted(self.arguments.items())} {steps} {at.lengths}".encode())
        home = inspect.getmodule(getattr(rewrites, self.rewrite, None)) or rewrites
        own = Path(str(home.__file__))
        files = sorted(own.parent.glob("*.py")) if own.name == "rewrite.py" else [own]
        for path in (*files, Path(healing.__file__), Path(subjects.__file__)):
            held.update(path.read_bytes())
        return held.hexdigest()[:12]


_STATE = "such attention needs a state of fixed size and no cache; no decode step that keeps one is generated yet"
_SHORT = {"always": True, "method": "window"}
_BLOCKS = {"always": True, "method": "blocks"}
_HEDGEHOG = {"feature": "hedgehog", "steps": 60, "length": 8192, "progress": False}


def _mixtures(subject: str, heads: int) -> tuple[Row, ...]:
    """A quarter, half and three quarters of the heads on, by both routers."""
    rows = []
    for router in ("norm", "linear"):
        for quarters in (1, 2, 3):
            on = heads * quarters // 4
            shared = max(1, on // 3)
            given = {"shared": shared, "active": on - shared, "router": router, "always": True}
            strength = f"{router}, {25 * quarters} % on ({shared} shared, {on - shared} routed)"
            rows.append(Row("MixHeads", strength, given, (), (subject,)))
    return tuple(rows)


ROWS = (
    Row("ShareKV", "4 of 8, mean", {"method": "mean"}, (4,), ("lm",)),
    Row("ShareKV", "4 of 8, aligned", {"method": "aligned"}, (4,), ("lm",)),
    Row("ShareKV", "2 of 8, aligned", {"method": "aligned"}, (2,), ("lm",)),
    Row("ShareKV", "6 of 12, mean", {"method": "mean"}, (6,), ("minilm",)),
    Row("ShareKV", "6 of 12, aligned", {"method": "aligned"}, (6,), ("minilm",)),
    Row("PruneHeads", "a quarter, by magnitude", {"fraction": 0.25, "score": "magnitude"}),
    Row("PruneHeads", "a quarter, by gradient", {"fraction": 0.25, "score": "gradient"}),
    Row("Sparsify", "window 256, 4 sinks", {**_SHORT, "window": 256}, (), ("lm",)),
    Row("Sparsify", "4 blocks of 64", {**_BLOCKS, "top": 4}, (), ("lm",)),
    Row("Sparsify", "blocks of mass 0.9", {**_BLOCKS, "mass": 0.9}, (), ("lm",)),
    Row("Sparsify", "window 64", {**_SHORT, "window": 64}, (), ("minilm",)),
    Row("Sparsify", "2 blocks of 32", {**_BLOCKS, "top": 2, "block": 32, "tile": 32}, (), ("minilm",)),
    Row("Linearize", "elu", {"feature": "elu", "length": 8192}, (), note=_STATE),
    Row("Linearize", "elu, window 128", {"feature": "elu", "window": 128, "length": 8192}, (), ("lm",), _STATE),
    Row("Linearize", "hedgehog", _HEDGEHOG, (), note=_STATE),
    Row("Linearize", "hedgehog, window 128", {**_HEDGEHOG, "window": 128}, (), ("lm",), _STATE),
    *_mixtures("lm", 8),
    *_mixtures("minilm", 12),
)
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
    ours, original = timings(fast, at, repeats)
    note = row.note
    try:
        after = at.quality(attnopt.heal(fast, at.model, at.data, steps, lr=at.lr, loss=at.loss, progress=False))
    except (AttnoptError, RuntimeError) as error:
        after, note = None, f"not healed: {error}".splitlines()[0]
    return Figures(
        at.name, row.rewrite, row.strength, int(done.get("sites", 0)), before, after,
        sum(p.numel() for p in fast.parameters()), kv_bytes(fast), ours, original, note, row.code(at, steps),
    )  # fmt: skip


def kv_bytes(fast: nn.Module) -> int:
    """Bytes of keys and values that a token leaves in an fp32 cache.

    Linear attention needs a state of fixed size instead, and beside a window only the last keys: none a token.
    """
    specs = [site.spec for site in fast.report.sites if site.spec is not None]
    heads = [s.heads for s in specs if isinstance(s.normalizer, Softmax)]
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
        for turn in range(repeats if length < _LONG else _TURNS):
            for model, times in zip((fast, plain), seen, strict=True):
                started = time.perf_counter()
                model(**given)
                if turn or repeats == 1:  # the first call of a shape is checked against the reference
                    times.append(1e3 * (time.perf_counter() - started))
        ours[str(length)], original[str(length)] = (statistics.median(times) for times in seen)
    return ours, original


_BASELINES: dict[str, nn.Module] = {}


def baseline(at: Subject) -> nn.Module:
    """The subject with exact rewrites alone: what a rewrite has to beat."""
    if at.name not in _BASELINES:
        _BASELINES[at.name] = attnopt.optimize(at.model, (), at.example, dynamic_shapes=at.shapes, validate=False)
    return _BASELINES[at.name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=40, help="healing budget, updates")
    parser.add_argument("--repeats", type=int, default=4, help="timed calls at short lengths, the first left out")
    parser.add_argument("--threads", type=int, default=1)
    names = [*SUBJECTS, "bias"]
    parser.add_argument("--subjects", nargs="*", default=names, choices=names)
    parser.add_argument("--only", default="", help="rewrites whose name holds this")
    parser.add_argument("--again", action="store_true", help="measure lines that are there already, too")
    parser.add_argument("--no-picture", action="store_true")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.subjects:
        if name in SUBJECTS:
            subject(SUBJECTS[name](), asked)
        else:
            lines = [asdict(quality_bias.measure(row, asked.repeats + 4)) for row in quality_bias.ROWS]
            about = {"torch": torch.__version__, "threads": asked.threads}
            quality_text.write(asked.out, {"bias": {"about": about, "rows": lines}})
    quality_text.write(asked.out, {}, picture=not asked.no_picture)
    return 0


def subject(at: Subject, asked: argparse.Namespace) -> None:
    """All lines of one subject, those that are there already left as they are."""
    held = {} if asked.again else quality_text.held(asked.out).get(at.name, {})
    there = {(x["rewrite"], x["strength"], x.get("code")): Figures(**x) for x in held.get("rows", [])}
    left_out = held.get("left out", {})
    rows = [r for r in ROWS if at.name in r.subjects]
    exact = Row("none", "exact", {})
    # What is there already stays on disk while lines before it are measured.
    lines = {_name(row): line for row in (exact, *rows) if (line := there.get(_key(row, at, asked.steps)))}
    declined: dict[str, str] = {}
    for row in tqdm((exact, *rows), desc=at.name):
        key, name = _key(row, at, asked.steps), _name(row)
        if asked.only not in row.rewrite and row is not exact:
            older = [x for (rewrite, strength, _), x in there.items() if (rewrite, strength) == key[:2]]
            lines |= {name: older[-1]} if older else {}
            declined |= {name: left_out[name]} if name in left_out else {}
        elif key in there:
            continue
        elif row is exact:
            lines[name] = original(at, asked.repeats, key[2])
        else:
            line = measure(row, at, asked.steps, asked.repeats)
            lines |= {name: line} if isinstance(line, Figures) else {}
            declined |= {name: line} if isinstance(line, str) else {}
        about = {"torch": torch.__version__, "threads": asked.threads, "steps": asked.steps, "title": at.title}
        ordered = [asdict(lines[n]) for n in map(_name, (exact, *rows)) if n in lines]
        found = {"about": about, "rows": ordered, "left out": dict(declined)}
        quality_text.write(asked.out, {at.name: found})


def _name(row: Row) -> str:
    return f"{row.rewrite} ({row.strength})"


def _key(row: Row, at: Subject, steps: int) -> tuple[str, str, str]:
    return row.rewrite, row.strength, row.code(at, steps)


def original(at: Subject, repeats: int, code: str = "") -> Figures:
    """The first line: the model with exact rewrites alone, timed against itself, which shows the noise."""
    plain = baseline(at)
    ours, again = timings(plain, at, repeats)
    size, quality = sum(p.numel() for p in at.model.parameters()), at.quality(at.model)
    note = at.note + ("; " if at.note else "") + "timed against itself, which shows the noise"
    return Figures(at.name, "none", "exact", 0, quality, None, size, kv_bytes(plain), ours, again, note, code)


if __name__ == "__main__":
    raise SystemExit(main())
