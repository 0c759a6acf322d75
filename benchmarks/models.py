"""Whole models: attnopt against transformers' eager and sdpa attention and against `torch.compile` of each.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/models.py --json benchmarks/results/models.json
    python benchmarks/models.py --only gpt2 bert --layers 2 --rounds 5

Widths and lengths are those of the published models, weights are random, everything around the attention is the same.
Layers are alike, so by default two of them (of each kind) run; `--layers 0` runs them all. Every side runs once a
round; times are medians, with one thread of processor seconds. A ratio above 1 means that attnopt is faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attnopt

SIDES = ("eager", "sdpa", "compile(eager)", "compile(sdpa)", "attnopt", "compile(attnopt)")
SHORT = {"use_cache": False, "vocab_size": 1024}


@dataclass(frozen=True)
class Row:
    """A model: its classes, its settings, the setting that counts layers, and its inputs."""

    name: str
    title: str
    model: str
    config: str
    settings: dict[str, Any]
    layers: tuple[str, ...]
    length: int
    kind: str = "tokens"
    full: dict[str, Any] | None = None

    def takes(self, attention: str) -> bool:
        """Whether transformers has this attention for the model; it has no SDPA for soft-capped scores."""
        return attention == "eager" or getattr(transformers, self.model)._supports_sdpa

    def build(self, attention: str, layers: int) -> torch.nn.Module:
        """The model in evaluation mode, the same weights for every attention."""
        fewer = {name: layers for name in self.layers} if layers else (self.full or {})
        config = getattr(transformers, self.config)(attn_implementation=attention, **{**self.settings, **fewer})
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, self.model)(config)
        return model.eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Token ids `[1, length]` (a padded batch of two for BERT), or pixels."""
        generator = torch.Generator().manual_seed(0)
        if self.kind == "pixels":
            return {"pixel_values": torch.randn(1, 3, self.length, self.length, generator=generator)}
        ids = torch.randint(4, 1000, (2 if self.kind == "padded" else 1, self.length), generator=generator)
        if self.kind == "padded":
            mask = torch.ones_like(ids)
            mask[1, self.length * 3 // 4 :] = 0
            return {"input_ids": ids, "attention_mask": mask}
        return {"input_ids": ids, "decoder_input_ids": ids} if self.kind == "pair" else {"input_ids": ids}


ROWS = (
    Row("gpt2", "GPT-2 medium, S=2048", "GPT2Model", "GPT2Config",
        {"n_embd": 1024, "n_head": 16, "n_positions": 2048, **SHORT}, ("n_layer",), 2048, full={"n_layer": 24}),
    Row("llama", "Llama-like 300M, 16/4 heads, S=4096", "LlamaModel", "LlamaConfig",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
         "max_position_embeddings": 4096, **SHORT}, ("num_hidden_layers",), 4096, full={"num_hidden_layers": 24}),
    Row("t5", "T5-base, S=1024", "T5Model", "T5Config",
        {"d_model": 768, "d_ff": 3072, "num_heads": 12, **SHORT}, ("num_layers", "num_decoder_layers"), 1024,
        "pair", full={"num_layers": 12, "num_decoder_layers": 12}),
    Row("swin", "Swin-B, 224 px", "SwinModel", "SwinConfig",
        {"embed_dim": 128, "num_heads": [4, 8, 16, 32], "depths": [2, 2, 2, 2]}, (), 224, "pixels",
        full={"depths": [2, 2, 18, 2]}),
    Row("gemma2", "Gemma-2-like, window 1024, S=4096", "Gemma2Model", "Gemma2Config",
        {"hidden_size": 1152, "intermediate_size": 4608, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 1024, **SHORT}, ("num_hidden_layers",), 4096,
        full={"num_hidden_layers": 26}),
    Row("bert", "BERT-large, S=512, padded batch of 2", "BertModel", "BertConfig",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 1024},
        ("num_hidden_layers",), 512, "padded", full={"num_hidden_layers": 24}),
)  # fmt: skip


@dataclass
class Result:
    """Median milliseconds by side; `error` is our rms distance from eager, relative to eager's own rms."""

    name: str
    title: str
    layers: int
    threads: int
    sites: int
    fused: int
    times: dict[str, float]
    error: float

    @property
    def ratios(self) -> dict[str, float]:
        """Every rival's time over the better of our two."""
        ours = min(t for side, t in self.times.items() if "attnopt" in side)
        return {side: t / ours for side, t in self.times.items() if "attnopt" not in side}


@torch.no_grad()
def measure(row: Row, layers: int, rounds: int, sides: tuple[str, ...], say: Callable[[str], None]) -> Result:
    """One row. Everything is compiled and run once before the clock starts."""
    inputs = row.inputs()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    models = {attention: row.build(attention, layers) for attention in ("eager", "sdpa") if row.takes(attention)}
    sides = tuple(side for side in sides if "sdpa" not in side or "sdpa" in models)
    fast = attnopt.optimize(models["eager"], (), inputs)
    calls: dict[str, Callable[..., Any]] = {
        **models, "attnopt": fast,
        **{f"compile({name})": torch.compile(model) for name, model in models.items()},
        "compile(attnopt)": torch.compile(row.build("eager", layers), backend="attnopt"),
    }  # fmt: skip
    first = {}
    for side in sides:
        say(f"{row.name}: {side}")
        first[side] = _first_output(calls[side](**inputs))
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds):
        say(f"{row.name}: round {turn + 1} of {rounds}")
        for side in sides:
            start = clock()
            calls[side](**inputs)
            taken[side].append((clock() - start) * 1e3)
    gap = (first["attnopt"] - first["eager"]).double().square().mean().sqrt() / first["eager"].double().std()
    return Result(
        row.name, row.title, layers, torch.get_num_threads(), len(fast.report.sites), fast.report.fused,
        {side: round(statistics.median(times), 2) for side, times in taken.items()}, float(gap),
    )  # fmt: skip


def _first_output(output: Any) -> torch.Tensor:
    return next(t for t in output.to_tuple() if isinstance(t, torch.Tensor)).clone()


def table(results: list[Result]) -> list[list[str]]:
    """Rows of text: the model, each side in milliseconds, and how much slower the best rival is."""
    lines = [["model", "sites fused", *(f"{s}, ms" for s in SIDES), "best rival / attnopt", "error"]]
    for r in results:
        times = [f"{r.times[s]:.0f}" if s in r.times else "-" for s in SIDES]
        best = f"{min(r.ratios.values()):.2f}x"
        lines.append([r.title, f"{r.fused} of {r.sites}", *times, best, f"{r.error:.1e}"])
    return lines


def main() -> None:
    """Measure the chosen rows, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="rows; all by default")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="what to compare")
    parser.add_argument("--layers", type=int, default=2, help="layers of each kind; 0 for all (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures here, and the table beside it as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    sides = tuple(s for s in SIDES if s in {*options.sides, "eager", "attnopt"})
    results: list[Result] = []
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    with Progress() as progress:
        task = progress.add_task("models", total=len(rows))
        for row in rows:
            results.append(measure(row, options.layers, options.rounds, sides,
                                   lambda step: progress.update(task, description=step)))  # fmt: skip
            progress.advance(task)
            gc.collect()
            torch._dynamo.reset()
            if options.json:
                _write(options.json, results, options.layers)
    shown = Table("", *(r.name for r in results))
    for heading, *values in list(zip(*table(results), strict=True))[1:]:
        shown.add_row(heading, *values)
    Console().print(shown)


def _write(path: Path, results: list[Result], layers: int) -> None:
    found = [{**asdict(r), "ratios": {s: round(x, 3) for s, x in r.ratios.items()}} for r in results]
    path.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")
    lines = table(results)
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    deep = f"{layers} layers of each kind" if layers else "all layers"
    text = [f"{threads}, torch {torch.__version__}, {deep}, medians", "", "| " + " | ".join(lines[0]) + " |"]
    text += ["|" + " --- |" * len(lines[0]), *("| " + " | ".join(line) + " |" for line in lines[1:])]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
