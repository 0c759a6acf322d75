"""What others take for the same attention: PyTorch's kernels by name, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnopt.analysis.linear_form import linear_form
from attnopt.runtime.linear import linear
from attnopt.spec import AttentionSpec
from gpu_parts.rows import BLOCK, Row

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Where `scaled_dot_product_attention` says the same without a mask of queries by keys in memory.
_SDPA_SPECS = ("dense", "causal", "bias")
Call = Callable[[], Tensor]


def sdpa(row: Row, tensors: Sequence[Tensor], name: str) -> Call | str:
    """`scaled_dot_product_attention` by the kernel of this name, or why not."""
    if row.spec not in _SDPA_SPECS:
        return "no such attention"
    q, k, v, *captures = tensors
    mask = captures[0][None].to(q.dtype) if row.spec == "bias" else None
    causal, grouped = row.spec == "causal", row.heads.q != row.heads.k

    def call() -> Tensor:
        with sdpa_kernel(SDPA[name]):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)

    return call


def score_and_mask(row: Row, captures: Sequence[Tensor]) -> tuple[Any, Any] | None:
    """The row's spec as FlexAttention's functions `score_mod` and `mask_mod`; None where it cannot be said."""

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    c = captures[0] if captures else None
    n = row.n_q
    table: dict[str, tuple[Any, Any]] = {
        "dense": (None, None),
        "causal": (None, causal),
        "window": (None, lambda b, h, q, k: (q >= k) & (k > q - 1024)),
        "alibi": (lambda s, b, h, q, k: s + c[h] * (k - q), causal),  # type: ignore[index]
        "softcap": (lambda s, b, h, q, k: 50 * torch.tanh(s / 50), causal),
        "bias": (lambda s, b, h, q, k: s + c[h, q, k], None),  # type: ignore[index]
        "line": (lambda s, b, h, q, k: s + c[h, k - q + n - 1], None),  # type: ignore[index]
        "padding": (None, lambda b, h, q, k: c[b, k] != 0),  # type: ignore[index]
        "blocks": (None, lambda b, h, q, k: c[h, q // BLOCK, k // BLOCK] != 0),  # type: ignore[index]
        "documents": (None, lambda b, h, q, k: (c[b, q] == c[b, k]) & (q >= k)),  # type: ignore[index]
    }
    return table.get(row.spec)


def flex(row: Row, tensors: Sequence[Tensor], mode: str | None = None) -> Call | str:
    """Compiled FlexAttention, or why it cannot say this attention. `mode` is `torch.compile`'s."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, *captures = tensors
    said = score_and_mask(row, captures)
    if said is None:
        return "its weights are a softmax, and it has no gate or sink"
    score, mask = said
    if row.spec == "blocks":
        mask = whole_blocks(captures[0], mask, row)
    elif mask is not None:
        per_batch = row.batch if row.spec in ("padding", "documents") else None
        mask = create_block_mask(mask, per_batch, None, row.n_q, row.n_k, device=q.device)
    torch._dynamo.reset()  # another row is no recompilation, which it would count
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    grouped = row.heads.q != row.heads.k
    return lambda: compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=grouped)  # type: ignore[no-any-return]


def whole_blocks(kept: Tensor, mask: Any, row: Row) -> Any:
    """FlexAttention's mask of a map `[H, rows, blocks]`: blocks that are kept whole or not at all."""
    from torch.nn.attention.flex_attention import BlockMask

    order = (kept == 0).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)[None]
    count = (kept != 0).sum(-1, dtype=torch.int32)[None]
    none = torch.zeros_like(count), torch.zeros_like(order)
    lengths = row.n_q, row.n_k
    return BlockMask.from_kv_blocks(*none, count, order, BLOCK_SIZE=BLOCK, mask_mod=mask, seq_lengths=lengths)


def operators(spec: AttentionSpec, tensors: Sequence[Tensor]) -> Call | str:
    """Linear attention, chunk by chunk, in PyTorch's own operators; or why not."""
    form = linear_form(spec)
    if form is None:
        return "no such attention"
    return lambda: linear(spec, form, *tensors[:3])


def gradient_of(call: Call, tensors: Sequence[Tensor], grad: Tensor) -> Call:
    """The backward alone of what `call` computes from q, k and v, which must require gradients."""
    out = call()
    return lambda: torch.autograd.grad(out, list(tensors[:3]), grad, retain_graph=True)[0]
