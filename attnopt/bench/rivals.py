"""What people run today, for the rows that it can compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import sympy as sp
import torch
from torch import Tensor

from attnopt import expr as ex
from attnopt.analysis.grid import Grid
from attnopt.bench.cases import Case
from attnopt.spec import Softmax

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def grid_of(case: Case, captures: Sequence[Tensor]) -> Grid:
    """The case's coordinates and captures for numpy."""
    named = {c.name: t.numpy() for c, t in zip(case.spec.captures, captures, strict=True)}
    return Grid((case.batch, case.spec.heads.q, case.n_q, case.n_k), named)


def sdpa(case: Case, captures: Sequence[Tensor]) -> Call | None:
    """`scaled_dot_product_attention`, with a mask made beforehand where the spec needs one; None if it cannot.

    It can for scores of the form `number * s + bias` under a plain softmax.
    """
    spec = case.spec.canonical()
    scale = sp.diff(spec.score, ex.s)
    if spec.normalizer != Softmax() or spec.weight != 1 or not scale.is_number:
        return None
    grouped, bias = spec.heads.q != spec.heads.k, spec.score.xreplace({ex.s: sp.S.Zero})
    causal = spec.keep == sp.Ge(ex.q - ex.k, 0)
    mask: Tensor | None = None
    if bias != 0 or not (causal or spec.keep == sp.true):
        mask, causal = _mask(case, captures, bias), False

    def call(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Tensor:
        used = learned[0][None] if learned else mask
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=used, is_causal=causal, scale=float(scale), enable_gqa=grouped
        )

    return call


def _mask(case: Case, captures: Sequence[Tensor], bias: sp.Expr) -> Tensor:
    grid = grid_of(case, captures)
    keep = grid.value(case.spec.canonical().keep)
    if bias == 0:
        return torch.from_numpy(_square(keep, case).copy())
    values = np.where(keep, grid.value(bias), -np.inf).astype(np.float32)
    return torch.from_numpy(_square(values, case).copy()).to(case.dtype)


def _square(values: np.ndarray, case: Case) -> np.ndarray:  # type: ignore[type-arg]
    """Broadcast over queries and keys alone, as a user's mask would be."""
    return np.broadcast_to(values, (*values.shape[:2], case.n_q, case.n_k))


def flex(case: Case, captures: Sequence[Tensor]) -> Call | None:
    """Compiled FlexAttention for the rows it is usually named for; None for the others."""
    mods = _FLEX.get(case.name)
    if mods is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score, keep = mods(captures)
    scale = 1.0 if case.name == "T5 bias" else None
    # By batch entry only where the mask is: a table for each would be read for nothing.
    sizes = (case.batch if case.name in _BY_ENTRY else None, None, case.n_q, case.n_k)
    mask = None if keep is None else create_block_mask(keep, *sizes, device="cpu")

    def compiled(dynamic: bool) -> Call:
        run = torch.compile(flex_attention, dynamic=dynamic)
        return lambda q, k, v: run(q, k, v, score_mod=score, block_mask=mask, scale=scale)  # type: ignore[return-value]

    return _Faster(compiled(False), compiled(True))


class _Faster:
    """The faster of several ways to compile one thing, found at the first call.

    Fixed and symbolic sizes of FlexAttention differ by up to eight times, in either direction, and either may fail.
    """

    def __init__(self, *ways: Call) -> None:
        self.ways = ways
        self.chosen: Call | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.chosen is None:
            self.chosen = self._choose(q, k, v)
        return self.chosen(q, k, v)

    def _choose(self, *inputs: Tensor) -> Call:
        times: dict[Call, float] = {}
        problem: Exception | None = None
        for way in self.ways:
            torch.compiler.reset()
            try:
                way(*inputs)
            except Exception as error:
                problem = error
                continue
            start = time.perf_counter()
            way(*inputs)
            times[way] = time.perf_counter() - start
        if problem is not None and not times:
            raise problem
        return min(times, key=times.__getitem__)


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q // 64 - k // 64).abs() <= 6) & ((q % 64 - k % 64).abs() <= 6)


_BY_ENTRY = ("documents", "padding")
_Mods = tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]
_FLEX: dict[str, Callable[[Sequence[Tensor]], _Mods]] = {
    "dense D=64": lambda c: (None, None),
    "dense D=128": lambda c: (None, None),
    "causal D=64": lambda c: (None, _causal),
    "causal D=128": lambda c: (None, _causal),
    "window 256": lambda c: (None, lambda b, h, q, k: (q >= k) & (q - k < 256)),
    "prefix": lambda c: (None, lambda b, h, q, k: (q >= k) | (k < 256)),
    "documents": lambda c: (None, lambda b, h, q, k: (c[0][b, q] == c[0][b, k]) & (q >= k)),
    "dilated": lambda c: (None, lambda b, h, q, k: (q >= k) & (q - k < 512) & ((q - k) % 2 == 0)),
    "neighbourhood 13x13": lambda c: (None, _near),
    "ALiBi": lambda c: (lambda s, b, h, q, k: s + c[0][h] * (k - q), _causal),
    "T5 bias": lambda c: (lambda s, b, h, q, k: s + c[0][((q - k).clamp(min=0) // 16).clamp(max=31), h], None),
    "dense bias": lambda c: (lambda s, b, h, q, k: s + c[0][h, q, k], None),
    "soft-cap": lambda c: (lambda s, b, h, q, k: 50 * torch.tanh(s / 50), _causal),
    "padding": lambda c: (None, lambda b, h, q, k: c[0][b, k] != 0),
}
