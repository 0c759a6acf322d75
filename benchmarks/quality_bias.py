"""What `FactorBias` costs and saves on models whose scores have a bias: ALiBi, T5, Swin, and a smooth learned table.

Weights are random from the published configurations: no trained ones of these are at hand. For a table that is what
matters: Swin's is drawn with the published deviation of 0.02 and has full rank, as at the start of training; the last
one has the smooth values that training gives.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attnopt
from attnopt.rewrites import FactorBias, Tolerance
from benchmarks.quality_text import BiasFigures

ANY = Tolerance(output=1e9)
_LENGTH = 1024
_DRAWN = 0.02  # deviation of Swin's tables at the start (Liu et al. 2021, section A2)
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def alibi() -> Built:
    """MPT with two layers: `m_h (k - n + 1)`, made of positions alone."""
    import transformers

    config = transformers.MptConfig(
        d_model=512, n_heads=8, n_layers=2, max_seq_len=_LENGTH, vocab_size=1024, attn_implementation="eager",
        use_cache=False,
    )  # fmt: skip
    return transformers.MptModel(config).eval(), (), {"input_ids": _ids()}


def t5() -> Built:
    """A T5 encoder at the width of T5-small, two layers: a table of 32 buckets of the distance."""
    import transformers

    config = transformers.T5Config(d_model=512, num_layers=2, vocab_size=1024, use_cache=False)
    return transformers.T5EncoderModel(config).eval(), (), {"input_ids": _ids()}


def swin() -> Built:
    """Swin-T with two stages of two layers, 224 px: a table of 169 offsets gathered to 49 by 49 a head."""
    import transformers

    config = transformers.SwinConfig(depths=[2, 2], num_heads=[3, 6], attn_implementation="eager")
    model = transformers.SwinModel(config).eval()
    for name, table in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.trunc_normal_(table, std=_DRAWN)
    return model, (torch.randn(1, 3, 224, 224),), {}


class Smooth(nn.Module):
    """Attention over a square of tokens with a dense learned table of the squared distance, steeper head by head."""

    def __init__(self, side: int = 32, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads, n = heads, side * side
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        at = torch.stack([torch.arange(n) // side, torch.arange(n) % side], -1) / side
        near = -(at[:, None] - at).square().sum(-1)
        self.table = nn.Parameter(2 * (near * torch.arange(1, heads + 1)[:, None, None]).exp())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + self.table, dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def smooth() -> Built:
    """`Smooth` at 1,024 tokens."""
    return Smooth().eval(), (torch.randn(1, _LENGTH, 512),), {}


@dataclass(frozen=True)
class BiasRow:
    """One model and one strength."""

    model: str
    build: Callable[[], Built]
    strength: str
    arguments: Mapping[str, Any]


ROWS = (
    BiasRow("MPT (ALiBi), 1,024 tokens", alibi, "exact", {}),
    BiasRow("T5 encoder (buckets), 1,024 tokens", t5, "exact", {}),
    *(BiasRow("Swin, windows of 49", swin, f"rank {r}", {"rank": r}) for r in (4, 16)),
    BiasRow("Swin, windows of 49", swin, "tolerance 0.01", {"tolerance": 0.01}),
    *(BiasRow("smooth table, 1,024 tokens", smooth, f"rank {r}", {"rank": r}) for r in (2, 8)),
    BiasRow("smooth table, 1,024 tokens", smooth, "tolerance 0.01", {"tolerance": 0.01}),
)


@torch.no_grad()
def measure(row: BiasRow, repeats: int) -> BiasFigures:
    """One line: `when="always"` for the figures, and what `when="pays"` says of the first site."""
    torch.manual_seed(0)
    model, args, kwargs = row.build()
    plain = attnopt.optimize(model, args, kwargs, validate=False)
    given: dict[str, Any] = {"tolerance": ANY, "calibration": [(args, kwargs)], "validate": False}
    fast = attnopt.optimize(model, args, kwargs, rewrites=[FactorBias(when="always", **row.arguments)], **given)
    asked = attnopt.optimize(model, args, kwargs, rewrites=[FactorBias(**row.arguments)], **given)
    reasons = [note.split(" was left as it is, because ")[-1].rstrip(".") for note in asked.report.notes]
    widths = {site.spec.heads.d_qk for site in plain.report.sites if site.spec}
    after = {site.spec.heads.d_qk for site in fast.report.sites if site.spec}
    figures = fast.report.figures["factor_bias"]
    seen: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for one, times in zip((fast, plain), seen, strict=True):
            started = time.perf_counter()
            one(*args, **kwargs)
            if turn:
                times.append(1e3 * (time.perf_counter() - started))
    return BiasFigures(
        row.model, row.strength, int(figures["sites"]), f"{_span(widths)} to {_span(after)}",
        float(figures["output change"]), int(figures["parameters after"]), int(figures["parameters before"]),
        *(statistics.median(times) for times in seen), reasons[0] if reasons else "",
    )  # fmt: skip


def _span(widths: set[int]) -> str:
    return f"{min(widths)}" if len(widths) == 1 else f"{min(widths)}–{max(widths)}"


def _ids() -> Tensor:
    return torch.randint(4, 1000, (1, _LENGTH))
