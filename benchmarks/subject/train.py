"""Train the subject on the standard library of the Python that runs this.

    python -m benchmarks.subject.train --minutes 40

Contexts of 256 bytes first, of 1,024 for the last part. Progress is saved every two minutes under `--folder` and is
taken up again from there. The learning rate follows the share of the budget that is spent, tokens or minutes,
whichever is further: so the schedule ends well on a slow machine. At the end the checkpoint, its recipe and an excerpt
of held-out text are written beside this file; `--export` writes them at every save.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.subject import model as subject
from benchmarks.subject.text import Text, stdlib

SAVE_EVERY = 120.0  # seconds
HELDOUT_WINDOWS = 64


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on, besides the text."""

    tokens: int = 8_000_000
    minutes: float = 40.0
    batch: int = 2048  # tokens a step
    short: int = 256
    long: int = 1024
    long_from: float = 0.7  # share of the budget after which contexts are long
    lr: float = 2e-3
    last_lr: float = 0.03  # as a share of lr
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = subject.SEED
    threads: int = 2

    def rate(self, spent: float) -> float:
        """The learning rate when this share of the budget is spent."""
        if spent < self.warmup:
            return self.lr * (spent + 1e-3) / (self.warmup + 1e-3)
        along = (min(spent, 1.0) - self.warmup) / (1 - self.warmup)
        return self.lr * (self.last_lr + (1 - self.last_lr) * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass
class Progress:
    """How far training is; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads together: what the machine was really asked for
    loss: float = math.log(256)


def batch_at(text: Tensor, step: int, length: int, recipe: Recipe) -> Tensor:
    """The windows of one step, drawn from its number alone: (batch // length, length), int64."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(text.numel() - length, (recipe.batch // length, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no decay on norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def train(recipe: Recipe, text: Text, folder: Path, export: bool = False) -> tuple[nn.Module, Progress]:
    """Train to the end of the budget, from the state in `folder` if there is one."""
    model, data = subject.new_subject(recipe.seed), torch.frombuffer(bytearray(text.train), dtype=torch.uint8)
    optimizer, progress, at = optimizer_for(model, recipe), Progress(), folder / "state.pt"
    if at.exists():
        state = torch.load(at, weights_only=True)
        if state["fingerprint"] != text.fingerprint:
            raise SystemExit(f"{at} belongs to another text; remove it, or give another --folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    model.train()
    saved, started = time.monotonic(), time.monotonic() - progress.seconds
    cpu_started = time.process_time() - progress.cpu_seconds
    with tqdm(total=recipe.tokens, initial=progress.tokens, unit="tok", unit_scale=True, mininterval=10) as bar:
        while (spent := max(progress.tokens / recipe.tokens, progress.seconds / (60 * recipe.minutes))) < 1:
            length = recipe.long if spent >= recipe.long_from else recipe.short
            ids = batch_at(data, progress.step, length, recipe)
            loss = step(model, optimizer, ids, recipe, spent)
            progress.step, progress.tokens = progress.step + 1, progress.tokens + ids.numel()
            progress.loss += (loss - progress.loss) * 0.02
            progress.seconds, progress.cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
            bar.update(ids.numel())
            bar.set_postfix(loss=f"{progress.loss:.3f}", spent=f"{spent:.1%}", context=length)
            if time.monotonic() - saved > SAVE_EVERY:
                save(model, optimizer, progress, text, at)
                if export:
                    write(model, progress, recipe, text)
                saved = time.monotonic()
    save(model, optimizer, progress, text, at)
    return model, progress


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, recipe: Recipe, spent: float) -> float:
    """One update; returns its loss, nats a byte."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(spent)
    loss = subject.next_byte_loss(model(ids, use_cache=False).logits, ids)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def save(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, text: Text, at: Path) -> None:
    """The whole state, written beside and renamed."""
    at.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save({**state, "fingerprint": text.fingerprint}, at.with_suffix(".part"))
    at.with_suffix(".part").replace(at)


def write(model: nn.Module, progress: Progress, recipe: Recipe, text: Text) -> dict[str, Any]:
    """The checkpoint, the excerpt, and the recipe with the figures of the checkpoint as it is read back."""
    part = subject.WEIGHTS.with_suffix(".next")
    excerpt = excerpt_of(text)
    subject.save_subject(model, {}, part, part.with_suffix(".about"))
    part.with_suffix(".about").unlink()
    read = subject.load_subject(part)
    heldout = subject.windows(text.heldout, recipe.long, HELDOUT_WINDOWS)
    about = {
        "shape": subject.SHAPE,
        "parameters": sum(p.numel() for p in read.parameters()),
        "recipe": asdict(recipe),
        "done": asdict(progress),
        "text": {
            "what": "the Python standard library without its tests",
            "python": text.python,
            "files": text.files,
            "train_bytes": len(text.train),
            "heldout_bytes": len(text.heldout),
            "fingerprint": text.fingerprint,
        },
        "heldout_loss": round(subject.loss_of(read, heldout), 4),
        "heldout_loss_256": round(subject.loss_of(read, heldout[:, :256]), 4),
        "excerpt_loss": round(subject.loss_of(read, subject.windows(excerpt, 1024, len(excerpt) // 1024)), 4),
        "torch": torch.__version__,
    }
    subject.save_subject(read, about)
    part.unlink()
    subject.EXCERPT.write_bytes(excerpt)
    return about


def excerpt_of(text: Text, pieces: int = 4, length: int = 1024) -> bytes:
    """A few pieces of held-out text, cut at evenly spread places."""
    last = len(text.heldout) - length
    return b"".join(text.heldout[s : s + length] for s in (last * (2 * i + 1) // (2 * pieces) for i in range(pieces)))


def main(argv: list[str] | None = None) -> int:
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=default.minutes, help="wall-clock budget")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="bytes to learn from, at most")
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--folder", type=Path, default=user_cache_path("attnopt") / "subject", help="where to resume")
    parser.add_argument("--export", action="store_true", help="write the checkpoint at every save, not only at the end")
    asked = parser.parse_args(argv)
    recipe = Recipe(minutes=asked.minutes, tokens=asked.tokens, threads=asked.threads)
    torch.set_num_threads(recipe.threads)
    text = stdlib()
    print(f"{text.files} files, {len(text.train):,} bytes to learn, {len(text.heldout):,} held out", flush=True)
    model, progress = train(recipe, text, asked.folder, asked.export)
    about = write(model, progress, recipe, text)
    print(
        f"held-out loss {about['heldout_loss']} nats a byte after {progress.tokens:,} bytes, {progress.seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
