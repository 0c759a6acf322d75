"""The conformance list and what Triton kernels have beyond it: other normalisers, factors of weights, dtypes of captures."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp
import torch

from attnopt import expr as ex
from attnopt.expr import b, h, k, n_k, q, s
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Pointwise, Softmax
from tests import specs
from tests.specs import CASES, OBSERVED, Case, Maker, Sizes

_HEADS = Heads(2, 1, 1, 16, 16)
_S = ex.number(16**-0.5) * s
# Heads of keys and of values are shared differently; one of the values is read by none.
_TWO_MAPS = Heads(4, 2, 3, 16, 24, (0, 1, 0, 1), (2, 0, 0, 2))
_CAUSAL = k <= q
_LOCAL = ex.load("bias", b, q, k)


def _bias(dtype: torch.dtype, *, steps: int = 1) -> Maker:
    """`[B, n_q, n_k]` with stride `steps` along keys."""

    def make(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
        made = torch.randn(sizes.batch, sizes.n_q, steps * sizes.n_k, generator=generator)
        return made.to(dtype)[..., ::steps]

    return make


def _ids(dtype: torch.dtype) -> Maker:
    def make(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
        made = torch.randint(0, 2, [sizes.batch, sizes.n_k], generator=generator)
        made[:, 0] = 1
        return made.to(dtype)

    return make


def _case(name: str, makers: tuple[Maker, ...] = (), captures: tuple[Capture, ...] = (), **parts: object) -> Case:
    spec = AttentionSpec(**{"heads": _HEADS, "score": _S, "captures": captures, **parts})  # type: ignore[arg-type]
    return Case(name, spec, makers)


_BIAS = (Capture("bias", "float", (None, None, None)),)
_PAD = (Capture("pad", "int", (None, None)),)
_KEPT = sp.Ne(ex.load("pad", b, k, integer=True), 0)
_SIGMOID = 1 / (1 + sp.exp(-_S))

EXTRA: tuple[Case, ...] = (
    _case("sigmoid_causal", score=_SIGMOID, normalizer=Pointwise(), keep=_CAUSAL),
    _case("relu_mean", score=ex.Maximum(_S, 0), normalizer=Pointwise(ex.Maximum(ex.t, sp.Rational(1, 8)))),
    _case("signed_causal", score=_S, normalizer=Pointwise(ex.Maximum(ex.a, 1)), keep=_CAUSAL, returns=("lse",)),
    _case("decayed", score=_S * ex.Where(_CAUSAL, sp.exp((k - q) * sp.Rational(1, 8)), 0), normalizer=Pointwise(n_k)),
    _case("weight", weight=sp.exp((k - q) * sp.Rational(1, 16)), keep=_CAUSAL, empty_row=EmptyRow.ZERO),
    _case("dropped_keys", (_ids(torch.bool),), _PAD, weight=ex.Where(_KEPT, sp.Rational(3, 2), 0)),
    _case("half_bias", (_bias(torch.bfloat16),), _BIAS, score=_S + _LOCAL, keep=_CAUSAL),
    _case("strided_bias", (_bias(torch.float32, steps=2),), _BIAS, score=_S + _LOCAL),
    _case("bytes", (_ids(torch.uint8),), _PAD, keep=_KEPT),
    _case("short_integers", (_ids(torch.int32),), _PAD, keep=sp.And(_KEPT, _CAUSAL)),
    _case("bias_only", (_bias(torch.float32),), _BIAS, score=_LOCAL),
    _case("roots", score=ex.sp.sqrt(1 + _S**2) + _S**3 / 9),
    _case("waves", score=_S + sp.sin(q * sp.Rational(1, 3)) * sp.cos(k * sp.Rational(1, 5)) + sp.erf(_S)),
    _case("signs", score=_S + sp.sign(q - k) * sp.Rational(1, 3) - sp.Abs(q - k) * sp.Rational(1, 16)),
    _case("head_and_batch", score=_S + h - b, normalizer=Softmax(h - sp.Rational(1, 2)), returns=("lse",)),
    _case("two_maps", heads=_TWO_MAPS, keep=_CAUSAL, score=ex.number(16**-0.5) * s),
    _case("remainders", keep=sp.Or(sp.Eq(ex.Mod(k - 5 * q, 7), 0), sp.Eq(ex.FloorDiv(q - k, 3), -1)), empty_row=EmptyRow.ZERO),
)  # fmt: skip


def case(name: str) -> Case:
    """The case of this name, of either list."""
    return next((c for c in EXTRA if c.name == name), None) or specs.case(name)


def everything() -> tuple[Case, ...]:
    """All lists."""
    return (*CASES, *OBSERVED, *EXTRA)


def at(item: Case, heads: Heads) -> Case:
    """The case at other head counts and widths."""
    return replace(item, spec=replace(item.spec, heads=heads))
