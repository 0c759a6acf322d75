"""Attention with a mixed normaliser at linear cost: a softmax window, and a state for all keys before it.

The forward runs the two parts as attentions of their own, the window on whatever kernel is best, and joins them by the
window's log-sum-exp. `chunked` is the same in torch's operators, in one pass, with memory linear in the length: what
the gradient goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.mixed_form import LEAST, MixedForm
from attnopt.runtime import linear
from attnopt.runtime.evaluate import Scope, evaluate
from attnopt.runtime.reference import Sample, _heads, _scope, _without_scores
from attnopt.spec import AttentionSpec

Run = Callable[..., tuple[Tensor, Tensor]]
_LEAST_CHUNK = 64


class Parts:
    """Runs a spec that has a mixed form; `run` is the operator's own kernel, `native` one for the linear part."""

    name = "mixed"

    def __init__(self, spec: AttentionSpec, form: MixedForm, run: Run, native: Any = None) -> None:
        self.spec, self.form, self.run, self.native = spec, form, run, native

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
    ) -> tuple[Tensor, None]:
        form, width = self.form, self.form.width
        if q.dtype == torch.float64:  # the operator's log-sum-exp is fp32
            return chunked(self.spec, form, q, k, v, captures, scalars), None
        near, lse = self.run(q[..., :width], k[..., :width], v, list(captures), list(scalars), form.near.text)
        scope = _plain(self.spec, q, k, captures, scalars)
        inputs = (q[..., width:], k[..., width:], v)
        if self.native is not None:
            mean, total = self.native(*inputs, captures, scalars, total=True)
            mean, total = mean.to(scope.dtype), total.to(scope.dtype).unsqueeze(-1)
        else:
            far = linear.sums(form.far, form.linear, scope, inputs, total=True)
            total = far[..., -1:]
            mean = far[..., :-1] / total.clamp_min(LEAST)
        out = _joined(near.to(scope.dtype), lse.to(scope.dtype).unsqueeze(-1), mean, total)
        return _gated(self.spec, scope, out).to(q.dtype), None


def _plain(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int],
    sample: Sample | None = None, work: torch.dtype | None = None,
) -> Scope:  # fmt: skip
    work = work or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return _without_scores(_scope(spec, q, k, captures, scalars, sample or Sample(), work))


def _gated(spec: AttentionSpec, scope: Scope, out: Tensor) -> Tensor:
    return out if spec.gate == 1 else out * evaluate(spec.gate, _without_scores(scope)).to(out.dtype)


def _joined(near: Tensor, lse: Tensor, mean: Tensor, total: Tensor) -> Tensor:
    """Both parts over their common sum: the far one by its mean and its sum of weights. Without keys, zeros."""
    top = torch.maximum(lse.detach(), total.detach().log())  # it cancels
    top = top.masked_fill(top == -torch.inf, 0.0)
    share, rest = torch.exp(lse - top), torch.exp(-top) * total
    whole = (share + rest).masked_fill(lse.isneginf() & (total == 0), 1.0)
    return (near.masked_fill(share == 0, 0.0) * share + mean * rest) / whole


def chunked(
    spec: AttentionSpec, form: MixedForm, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (), sample: Sample | None = None, compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The attention `[B, Hq, n_q, d_v]` of a spec with a mixed form, differentiable; inputs as for `linear.linear`."""
    scope = _plain(spec, q, k, captures, scalars, sample, compute)
    offset, heads = int(evaluate(form.offset, scope)), scope.axes[ex.h]
    keys = _heads(k, spec.heads.k_map, heads, True).to(scope.dtype)
    values = _heads(v, spec.heads.v_map, heads, True).to(scope.dtype)
    front = max(offset, 0)
    length = q.shape[2] + front
    # A column of ones: what sums up to the weights themselves, and marks the keys that are there.
    there = linear._grid(form.linear.key, scope, scope.dtype).transpose(-1, -2)
    there = there.expand(*keys.shape[:3], 1) if form.linear.key != 1 else keys.new_ones(*keys.shape[:3], 1)
    size = -(-min(max(form.window, _LEAST_CHUNK), max(length, 1)) // 16) * 16
    queries = linear._chunks(linear._aligned(q.to(scope.dtype), front, length), size)
    keys, values = (
        linear._chunks(linear._aligned(x, max(-offset, 0), length), size)
        for x in (keys, torch.cat([values * there, there], -1))
    )
    out = _by_chunk(form, queries, keys, values)
    return _gated(spec, scope, out.flatten(2, 3)[:, :, front:length]).to(q.dtype)


def _by_chunk(form: MixedForm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H, chunks, size, ..]` each; keys of a query's own chunk and the one before it are looked at one by one."""
    size, width = q.shape[3], form.width
    place = torch.arange(size, device=q.device)
    gap = place[:, None] - torch.cat([place - size, place])
    made = k[..., width:].transpose(-1, -2) @ v
    fade = torch.ones((), dtype=torch.float64, device=q.device)
    before = _shifted(linear._running(made, fade))
    k, v = (torch.cat([_shifted(x), x], 3) for x in (k, v))
    there = v[..., -1:].transpose(-1, -2) != 0
    logits = (q[..., :width] @ k[..., :width].transpose(-1, -2)) * float(form.scale)
    logits = logits.masked_fill(~(there & (gap >= 0) & (gap < form.window)), -torch.inf)
    far = q[..., width:] @ k[..., width:].transpose(-1, -2) * (gap >= form.window)
    beyond = far @ v + q[..., width:] @ before
    top = torch.maximum(logits.detach().amax(-1, keepdim=True), beyond.detach()[..., -1:].log())
    top = top.masked_fill(top == -torch.inf, 0.0)
    found = torch.exp(logits - top) @ v + beyond * torch.exp(-top)
    total = found[..., -1:]
    return found[..., :-1] / total.masked_fill(total == 0, 1.0)


def _shifted(x: Tensor) -> Tensor:
    """The chunk before each chunk; zeros before the first."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
