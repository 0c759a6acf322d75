"""The seed of a dropout mask: a tensor in the graph, so that it is drawn anew at every call, a number to kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.spec import AttentionSpec


def seeded(
    captures: Sequence[Tensor], scalars: Sequence[int], spec: Callable[[], AttentionSpec]
) -> tuple[list[Tensor], list[int]]:
    """Captures and scalars as kernels take them: a seed that follows the captures of a spec with dropout becomes
    its last scalar. Both passes of a training step see the same tensor, and so draw the same mask.

    Args:
        captures: tensors; the last may be the seed, an int64 scalar.
        scalars: integers.
        spec: gives the spec; asked only where there may be a seed.
    """
    last = captures[-1] if captures else None
    if last is None or last.dim() or last.dtype != torch.int64:
        return list(captures), list(scalars)
    known = spec()
    if not known.dropout or len(captures) == len(known.captures):
        return list(captures), list(scalars)
    return list(captures[:-1]), [*scalars, int(last)]
