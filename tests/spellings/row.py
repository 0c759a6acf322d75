"""One row of the spelling matrix, and the sizes and tensors that rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Q, K = 7, 9
MIN = torch.finfo(torch.float32).min
NEG_INF = float("-inf")
HEADS = ((2, 4, Q, 8), (2, 4, K, 8), (2, 4, K, 8))
GROUPED = ((2, 4, Q, 8), (2, 2, K, 8), (2, 2, K, 8))
LAST = ((2, Q, 4, 8), (2, K, 4, 8), (2, K, 4, 8))
SQUARE = ((2, 4, Q, 8),) * 3
# Kept keys by batch entry: some, then none at all.
PAD = torch.tensor([[1] * 9, [1] * 5 + [0] * 4], dtype=torch.bool)
PAD_ROWS = torch.tensor([[1] * 9, [0] * 9], dtype=torch.bool)
BIAS = torch.linspace(-2, 2, 4 * Q * K).view(4, Q, K).sin()


@dataclass(frozen=True)
class Spelling:
    """One way to write attention, and the spec that each of its sites must be read as.

    Attributes:
        name: of the row.
        run: function of q, k, v and `extra`, or a module.
        spec: the text of the expected spec; a tuple of texts for several sites in graph order.
        shapes: of q, k and v (or of fewer inputs), drawn from a normal distribution.
        extra: tensors that follow; gradients are asked of the floating ones.
        kernel: `reference` for most rows, `auto` for a sample that runs on compiled kernels.
        training: capture and run in training mode.
        gradients: whether the source has gradients at all.
    """

    name: str
    run: Callable[..., Any]
    spec: str | tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = HEADS
    extra: tuple[torch.Tensor, ...] = ()
    kernel: str = "reference"
    training: bool = False
    gradients: bool = True

    @property
    def specs(self) -> tuple[str, ...]:
        """The expected specs of all sites."""
        return (self.spec,) if isinstance(self.spec, str) else self.spec


def attend(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax over the keys, then the values."""
    return scores.softmax(-1) @ v


def ramp(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Numbers without pattern in `[-scale, scale]`, the same in every process."""
    count = 1
    for extent in shape:
        count *= extent
    return (torch.arange(count, dtype=torch.float32) * 12.9898).sin().view(shape) * scale
