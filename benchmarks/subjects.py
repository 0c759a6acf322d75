"""The models that rewrites are measured on, with their data and the measure of their quality."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = (1024, 8192)  # tokens at which a language model is timed


def cosine_distance(output: Any, target: Any) -> Tensor:
    """One minus the cosine of the last hidden states."""
    return 1 - torch.cosine_similarity(output[0], target[0], -1).mean()


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated and healed on, how its quality is measured, and inputs of a length to time."""

    name: str
    title: str
    model: nn.Module
    example: Mapping[str, Any]
    shapes: Any
    calibration: Sequence[Mapping[str, Any]]
    data: Sequence[Mapping[str, Any]]
    quality: Callable[[nn.Module], float]
    better: str
    timed: Callable[[int], Mapping[str, Any]]
    lengths: tuple[int, ...]
    loss: Any
    lr: float
    note: str = ""


def language_model(windows: int = 6) -> Subject:
    """The trained subject."""
    from benchmarks.subject import load_subject
    from benchmarks.subject.model import next_byte_loss
    from benchmarks.subject.model import windows as cut
    from benchmarks.subject.text import stdlib

    text = stdlib()
    heldout, learned = cut(text.heldout, 1024, windows), cut(text.train, 256, 168)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=1 << 15)

    free = {0: batch, 1: length}

    def inputs(ids: Tensor) -> dict[str, Any]:
        # A mask of ones, as a tokenizer gives it.
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    @torch.no_grad()
    def quality(model: nn.Module) -> float:
        losses = [next_byte_loss(model(**inputs(part)).logits, part).item() for part in heldout.split(2)]
        return statistics.fmean(losses)

    return Subject(
        "lm", "language model of Python source, 4.6 M parameters", load_subject(), inputs(learned[:2]),
        {"input_ids": free, "attention_mask": free, "use_cache": None}, [inputs(x) for x in learned[:8].split(4)],
        [inputs(x) for x in learned[8:].split(2)], quality, "lower",
        lambda n: inputs(torch.frombuffer(bytearray(text.heldout[:n]), dtype=torch.uint8)[None].long()), LENGTHS,
        "kl", 3e-4, "healing reads windows of 256 bytes",
    )  # fmt: skip


def minilm(words: int = 128) -> Subject:
    """MiniLM with its real weights, on documentation strings of the standard library."""
    from transformers import AutoTokenizer

    from attnopt.demo import models as demo
    from benchmarks.subject.text import stdlib

    row = next(r for r in demo.ROWS if not r.config)
    model = row.build()[0]
    tokenizer = AutoTokenizer.from_pretrained(demo._minilm_path(), local_files_only=True)
    halves = stdlib()
    texts = []
    for half, count in ((halves.heldout, 32), (halves.train, 160)):
        found = re.findall(r'"""(.{300,3000}?)"""', half.decode(errors="ignore"), re.DOTALL)
        texts += found[:: max(1, len(found) // count)][:count]
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=words, return_tensors="pt")

    def inputs(start: int) -> dict[str, Any]:
        return {k: made[k][start : start + 8] for k in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def embedded(one: nn.Module) -> Tensor:
        parts = []
        for start in range(0, 32, 8):
            given = inputs(start)
            mask = given["attention_mask"][..., None]
            parts.append((one(**given)[0] * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    original = embedded(model)

    def quality(one: nn.Module) -> float:
        return torch.cosine_similarity(embedded(one), original, -1).mean().item()

    batches = [inputs(start) for start in range(32, len(texts) - 7, 8)]
    return Subject(
        "minilm", "MiniLM-L6 with its real weights", model, inputs(0), None, batches[:4], batches[4:], quality,
        "higher", lambda n: inputs(0), (8 * words,), cosine_distance, 1e-4,
        f"{8 * words:,} tokens are 8 texts of {words}; the model reads at most 512, so there is no time at 8k",
    )  # fmt: skip
