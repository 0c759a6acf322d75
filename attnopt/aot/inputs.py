"""Tensors for the usual attentions: random where they are numbers, plain where they are masks."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.spec import AttentionSpec

# Tokens of a document.
_DOCUMENT = 1024


def usual_inputs(
    spec: AttentionSpec, batch: int, n_q: int, n_k: int, dtype: torch.dtype, device: str | torch.device
) -> list[Tensor]:
    """`q [B, Hq, n_q, d_qk]`, `k`, `v` of the dtype, then captures: floats in fp32, padding that keeps every key,
    documents of 1024 tokens. Raises `KeyError` for a capture that no usual spec has.
    """
    heads = spec.heads
    shapes = ((heads.q, n_q, heads.d_qk), (heads.k, n_k, heads.d_qk), (heads.v, n_k, heads.d_v))
    made = [torch.randn(batch, *shape, device=device, dtype=dtype) for shape in shapes]
    sizes = {"bias": (heads.q, n_q, n_k), "line": (heads.q, n_q + n_k), "gate": (batch, heads.q, n_q),
             "pad": (batch, n_k), "doc": (batch, max(n_q, n_k))}  # fmt: skip
    sizes |= dict.fromkeys(("slope", "sink", "rate"), (heads.q,))
    for capture in spec.captures:
        shape = sizes[capture.name]
        if capture.name == "rate":  # of decay
            made.append(-torch.rand(shape, device=device) / 16)
        elif capture.kind == "float":
            made.append(torch.randn(shape, device=device))
        elif capture.name == "doc":
            made.append((torch.ones(shape, device=device, dtype=torch.int64).cumsum(-1) - 1) // _DOCUMENT)
        else:
            made.append(torch.ones(shape, device=device, dtype=torch.int64))
    return made
