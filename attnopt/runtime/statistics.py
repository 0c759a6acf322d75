"""Side outputs of a row in eager PyTorch: lse, entropy, and the maximum and sum that weights are made of again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.returns import AGAIN, NOTHING, SKIPPED, of_rows
from attnopt.spec import AttentionSpec, EmptyRow


def of_softmax(
    spec: AttentionSpec, logits: Tensor, shift: Tensor, exps: Tensor, total: Tensor, sink: Tensor | None, empty: Tensor
) -> Tensor:
    """The side outputs of rows that `spec` returns, `[B, H, Q, n]` in order; lse where it returns none.

    Args:
        spec: what is computed.
        logits: `[B, H, Q, K]`, -inf where a key is not kept; exps: `exp(logits - shift)`.
        shift: `[B, H, Q, 1]`, the maximum, 0 where a row is empty. It counts as a constant.
        total: the sum of exps and of the sink's exponential, 1 where a row is empty.
        sink: the sink's logit, or None.
        empty: which rows have no key, nor a sink above -inf.
    """
    log_sum = torch.log(total)
    lse = torch.where(empty, torch.full_like(total, -torch.inf), log_sum + shift)
    asked = of_rows(spec.returns) or ("lse",)
    if asked == ("lse",):
        return lse
    made = {"lse": lse, "log_sum": log_sum, "max": torch.where(empty, torch.full_like(shift, -torch.inf), shift)}
    if "entropy" in asked:
        away = torch.where(exps == 0, torch.zeros_like(exps), logits - shift)  # 0 log 0 is 0
        spent = (exps * away).sum(-1, keepdim=True)
        if sink is not None:
            apart = sink - shift
            spent = spent + torch.exp(apart) * torch.where(apart == -torch.inf, torch.zeros_like(apart), apart)
        fill = entropy_of_nothing(spec.empty_row, logits.shape[-1])
        made["entropy"] = torch.where(empty, torch.full_like(total, fill), log_sum - spent / total)
    return torch.cat([made[name].expand_as(total) for name in asked], -1)


def entropy_of_nothing(policy: EmptyRow, n_k: int) -> float:
    """The entropy of a row without any key: that of the weights which its policy gives it."""
    return {EmptyRow.ZERO: 0.0, EmptyRow.NAN: math.nan, EmptyRow.UNIFORM: math.log(max(1, n_k))}[policy]


def of_nothing(spec: AttentionSpec, sink: Tensor | None, like: Tensor) -> Tensor:
    """The same where there are no keys at all: `[B, H, Q, n]`, as `like [B, H, Q, 1]`."""
    asked, made = of_rows(spec.returns) or ("lse",), []
    for name in asked:
        value = torch.full_like(like, NOTHING.get(name, 0.0))
        made.append(value if sink is None or name not in ("lse", "max") else sink.expand_as(like))
    return torch.cat(made, -1)


def of_skipped(spec: AttentionSpec, like: Tensor) -> Tensor:
    """The same for rows that are not computed: `[n]`, as `like`."""
    return like.new_tensor([SKIPPED[name] for name in of_rows(spec.returns) or ("lse",)])


def folded(
    returns: Sequence[str], found: Tensor | None, grads: Tensor | None
) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether these side outputs of rows have gradients that an lse has too; if so the lse and its gradient.

    `lse = max + log_sum` and the maximum is a constant, so that the gradient of `log_sum` is one of lse. That of an
    entropy is none.

    Args:
        returns: what the spec returns.
        found: the side outputs, `[B, H, n_q]` or `[B, H, n_q, n]`; None where they were not kept.
        grads: their gradients, or None.
    """
    asked = of_rows(returns)
    if asked in ((), ("lse",)):
        return True, found, grads
    given, kept = _by_name(asked, grads), _by_name(asked, found)
    if "entropy" in given and bool((given["entropy"] != 0).any()):
        return False, None, grads
    lse = kept.get("lse")
    if lse is None and all(name in kept for name in AGAIN):
        lse = kept["max"] + kept["log_sum"]
    parts = [given[name] for name in ("lse", "log_sum") if name in given]
    return True, None if lse is None else lse.contiguous(), sum(parts[1:], parts[0]).contiguous() if parts else None


def _by_name(asked: Sequence[str], tensor: Tensor | None) -> dict[str, Tensor]:
    if tensor is None or tensor.dim() < 3:
        return {}
    return {asked[0]: tensor} if len(asked) == 1 else dict(zip(asked, tensor.unbind(-1), strict=True))


def named(returns: Sequence[str], found: Tensor) -> dict[str, Tensor]:
    """The side outputs of rows by name, each `[B, H, n_q]`."""
    return _by_name(of_rows(returns), found)
