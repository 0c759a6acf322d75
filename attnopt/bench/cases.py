"""The rows of the benchmark table: an attention, its sizes, and what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.expr import b, h, k, n_k, n_q, q, s
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Softmax

TILE = 64


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: what the table shows; `--only` selects by a part of it.
        spec: the attention.
        batch, n_q, n_k: its sizes.
        dtype: of q, k and v.
        makers: one for each capture.
        targets: least values of `sdpa` and `flex` (speed against them), `peak`, `read` (shares of the measured
            ceilings), `own` (tiles a second against the own kernel of `beside`).
        beside: the attention without its modification: without its bias, or of all keys.
        backward: measure the gradients instead of the result.
        learned: of captures too, which are one dense bias.
        windows: q, k and v lie as `[B, N, H, D]`.
    """

    name: str
    spec: AttentionSpec
    batch: int
    n_q: int
    n_k: int
    dtype: torch.dtype = torch.float32
    makers: tuple[Callable[[], Tensor], ...] = ()
    targets: dict[str, float] = field(default_factory=dict)
    beside: AttentionSpec | None = None
    backward: bool = False
    learned: bool = False
    windows: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normal q, k and v from a fixed seed."""
        heads, generator = self.spec.heads, torch.Generator().manual_seed(0)

        def draw(count: int, length: int, width: int) -> Tensor:
            shape = (self.batch, length, count, width) if self.windows else (self.batch, count, length, width)
            made = torch.randn(shape, generator=generator).to(self.dtype)
            return made.transpose(1, 2) if self.windows else made

        sizes = ((heads.q, self.n_q, heads.d_qk), (heads.k, self.n_k, heads.d_qk), (heads.v, self.n_k, heads.d_v))
        first, second, third = (draw(*size) for size in sizes)
        return first, second, third


def _spec(count: int, width: int, shared: int = 0, wide: int = 0, **parts: object) -> AttentionSpec:
    heads = Heads(count, shared or count, shared or count, width, wide or width)
    return AttentionSpec(**{"heads": heads, "score": ex.number(width**-0.5) * s, **parts})  # type: ignore[arg-type]


def _float(name: str, rank: int) -> tuple[Capture, ...]:
    return (Capture(name, "float", (None,) * rank),)


def _int(name: str, rank: int) -> tuple[Capture, ...]:
    return (Capture(name, "int", (None,) * rank),)


def _documents(batch: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.arange(length).mul(8).div(length, rounding_mode="floor").expand(batch, -1).contiguous()


def _keep(batch: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.arange(length).expand(batch, -1) < length - length // 4


_S = ex.number(64**-0.5) * s
_CAUSAL = k <= q
_BIAS = ex.load("bias", h, q, k)
_PAD = sp.Ne(ex.load("pad", b, k, integer=True), 0)
_SAME = sp.Eq(ex.load("doc", b, q, integer=True), ex.load("doc", b, k, integer=True))
_T5 = ex.load("table", ex.Minimum(ex.FloorDiv(ex.Maximum(q - k, 0), 16), 31), h)
_ROW, _COLUMN = (lambda x: ex.FloorDiv(x, 64)), (lambda x: ex.Mod(x, 64))
_NEAR = [ex.Minimum(x - y, y - x) >= -6 for x, y in ((_ROW(q), _ROW(k)), (_COLUMN(q), _COLUMN(k)))]
# What is asked of masks, of biases on all keys and on causal ones, and of sinks.
_SPARSE: dict[str, Any] = {"targets": {"flex": 3, "own": 0.85}, "beside": _spec(4, 64)}
_PLAIN: dict[str, Any] = {"targets": {"flex": 3.5, "own": 0.85}, "beside": _spec(8, 64)}
_BENT: dict[str, Any] = {**_PLAIN, "beside": _spec(8, 64, keep=_CAUSAL)}
_SINKS: dict[str, Any] = {**_BENT, "targets": {"own": 0.85}}  # FlexAttention gives no lse on a CPU to add sinks to


def cases(quick: bool = False) -> tuple[Case, ...]:
    """Every row; `quick` takes a quarter of the length of the long ones."""
    n = 512 if quick else 2048
    long, context = (1024, 2048) if quick else (4096, 8192)
    made = lambda *shape: lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))  # noqa: E731
    dense, causal = {"sdpa": 1.15, "peak": 0.82}, {"sdpa": 1.3, "peak": 0.72}
    swin = _S * 0 + ex.number(32**-0.5) * s + _BIAS + ex.load("mask", ex.Mod(b, 64), q, k)
    pair = (*_float("bias", 3), *_float("mask", 3))
    rows = [
        Case("dense D=64", _spec(8, 64), 1, n, n, targets=dense),
        Case("dense D=128", _spec(4, 128), 1, n, n, targets=dense),
        Case("causal D=64", _spec(8, 64, keep=_CAUSAL), 1, n, n, targets=causal),
        Case("causal D=128", _spec(4, 128, keep=_CAUSAL), 1, n, n, targets=causal),
        Case("window 256", _spec(4, 64, keep=sp.And(_CAUSAL, k > q - 256)), 1, long, long, **_SPARSE),
        Case("prefix", _spec(4, 64, keep=sp.Or(_CAUSAL, k < 256)), 1, n, n, **_SPARSE),
        Case("documents", _spec(4, 64, keep=sp.And(_SAME, _CAUSAL), captures=_int("doc", 2)), 1, n, n,
             makers=(_documents(1, n),), **_SPARSE),
        Case("dilated", _spec(4, 64, keep=sp.And(_CAUSAL, k > q - 512, sp.Eq(ex.Mod(q - k, 2), 0))), 1, n, n,
             **_SPARSE),
        Case("neighbourhood 13x13", _spec(4, 64, keep=sp.And(*_NEAR)), 1, n, n, **_SPARSE),
        Case("ALiBi", _spec(8, 64, score=_S + ex.load("slope", h) * (k - q), keep=_CAUSAL,
                            captures=_float("slope", 1)), 1, n, n, makers=(lambda: -torch.rand(8),), **_BENT),
        Case("T5 bias", _spec(8, 64, score=s + _T5, captures=_float("table", 2)), 1, n, n, makers=(made(32, 8),),
             **_PLAIN),
        Case("dense bias", _spec(8, 64, score=_S + _BIAS, captures=_float("bias", 3)), 1, n, n,
             makers=(made(8, n, n),), **_PLAIN),
        Case("soft-cap", _spec(8, 64, score=50 * sp.tanh(_S / 50), keep=_CAUSAL), 1, n, n, **_BENT),
        Case("sinks", _spec(8, 64, keep=_CAUSAL, normalizer=Softmax(ex.load("sink", h)), captures=_float("sink", 1)),
             1, n, n, makers=(made(8),), **_SINKS),
        Case("padding", _spec(8, 64, keep=_PAD, captures=_int("pad", 2), empty_row=EmptyRow.ZERO), 2, n // 2, n // 2,
             makers=(_keep(2, n // 2),), **_PLAIN),
        Case("Swin 49x49x32", _spec(4, 32, score=swin, captures=pair), 64 if quick else 256, 49, 49,
             makers=(made(4, 49, 49), lambda: torch.zeros(64, 49, 49)), targets={"sdpa": 2.5}, windows=True),
        Case("decode bf16", _spec(32, 128, 8), 1, 1, context, torch.bfloat16, targets={"sdpa": 20, "read": 0.65}),
        Case("decode fp16", _spec(32, 128, 8), 1, 1, context, torch.float16, targets={"read": 0.65}),
        Case("decode fp32", _spec(32, 128, 8), 1, 1, context, targets={"read": 0.65}),
        Case("prefill bf16", _spec(8, 64, keep=_CAUSAL), 1, n, n, torch.bfloat16, targets={"sdpa": 1.15}),
        Case("prefill fp16", _spec(8, 64, keep=_CAUSAL), 1, n, n, torch.float16, targets={"sdpa": 1.15}),
        Case("wide queries 192/128", _spec(4, 192, wide=128, keep=_CAUSAL), 1, n // 2, n // 2, targets={"sdpa": 0.95}),
        Case("cross 77 keys", _spec(8, 64), 2, n, 77, targets={"sdpa": 0.95}),
        Case("batch 64", _spec(8, 64), 64, 128, 128, targets={"sdpa": 0.95}),
        Case("backward dense", _spec(8, 64), 1, n // 2, n // 2, targets={"sdpa": 1.1}, backward=True),
        Case("backward causal", _spec(8, 64, keep=_CAUSAL), 1, n // 2, n // 2, targets={"sdpa": 1.1}, backward=True),
        Case("backward, learned bias", _spec(8, 64, score=_S + _BIAS, captures=_float("bias", 3)), 1, n // 2, n // 2,
             makers=(made(8, n // 2, n // 2),), targets={"sdpa": 1.1}, backward=True, learned=True),
    ]  # fmt: skip
    rows += [Case(f"D={d}", _spec(4, d), 1, n // 2, n // 2, targets={"sdpa": 0.95}) for d in (40, 80, 96, 256)]
    rows += [Case(f"short S={x}", _spec(8, 64), 4, x, x, targets={"sdpa": 0.95}) for x in (1, 4, 16, 64)]
    return tuple(rows)


def unmodified(case: Case) -> Case | None:
    """The row of `beside`, of the same sizes; None if there is none."""
    return None if case.beside is None else replace(case, spec=case.beside, makers=(), beside=None, targets={})


def scores(case: Case) -> int:
    """How many scores of the whole the mask keeps, as an exact count over all heads and batch entries."""
    whole = case.batch * case.spec.heads.q * case.n_q * case.n_k
    return whole if case.spec.keep == sp.true else math.ceil(whole * float(_kept(case).mean()))


def tiles(case: Case) -> int:
    """How many tiles of `TILE` by `TILE` scores hold any that the mask keeps, over all heads and batch entries."""
    shape = (case.batch, case.spec.heads.q, case.n_q, case.n_k)
    kept = np.broadcast_to(_kept(case), shape) if case.spec.keep != sp.true else np.ones(shape, bool)
    for axis in (2, 3):
        kept = np.logical_or.reduceat(kept, range(0, kept.shape[axis], TILE), axis)
    return int(kept.sum())


def _kept(case: Case) -> Any:
    from attnopt.bench.rivals import grid_of

    return grid_of(case, [make() for make in case.makers]).value(case.spec.keep)


__all__ = ["Case", "cases", "n_k", "n_q", "scores", "tiles", "unmodified"]
