"""The conformance list: named specs with makers of their captures, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy as sp

from attnopt import expr as ex
from attnopt.expr import b, h, k, n_k, n_q, q, s
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Pointwise, Select, Softmax

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sizes:
    """The run-time sizes of one call."""

    batch: int
    heads: int
    n_q: int
    n_k: int


Maker = Callable[[Sizes, "torch.Generator"], "torch.Tensor"]


@dataclass(frozen=True)
class Case:
    """A spec, makers of its captures in order, and values of its scalars."""

    name: str
    spec: AttentionSpec
    makers: tuple[Maker, ...] = ()
    scalars: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def captures(self, sizes: Sizes, generator: torch.Generator) -> list[torch.Tensor]:
        """Fresh captured tensors for these sizes."""
        return [make(sizes, generator) for make in self.makers]


def _randn(*shape: Callable[[Sizes], int] | int) -> Maker:
    def make(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
        import torch

        return torch.randn([x if isinstance(x, int) else x(sizes) for x in shape], generator=generator)

    return make


def _padding(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """`[B, n_k]` bool; the first key is always kept."""
    import torch

    mask = torch.rand([sizes.batch, sizes.n_k], generator=generator) < 0.7
    mask[:, :1] = True
    return mask


def _hard_padding(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """`[B, n_k]` bool; the first entry of the batch keeps nothing."""
    mask = _padding(sizes, generator)
    mask[:1] = False
    return mask


def _additive(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """`[B, n_q, n_k]` of 0 and -inf, one value for all queries (stride 0); the first key is always kept."""
    import torch

    mask = torch.zeros([sizes.batch, 1, sizes.n_k]).masked_fill(~_padding(sizes, generator)[:, None], -torch.inf)
    return mask.expand(-1, sizes.n_q, -1)


def _documents(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """`[B, max(n_q, n_k)]` of int64 identities, some of which differ only above 32 bits."""
    import torch

    ids = torch.randint(0, 3, [sizes.batch, max(sizes.n_q, sizes.n_k)], generator=generator).sort(-1).values
    return ids * 2**32 + 7


def _routes(sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """`[B, H, n_q]`, zero where a token did not choose a head; the first head is always on, nobody chooses the last."""
    import torch

    chosen = torch.rand([sizes.batch, sizes.heads, sizes.n_q], generator=generator)
    gates = torch.where(chosen < 0.5, chosen + 0.5, 0.0)
    gates[:, 0] = 1.0
    gates[:, -1] = 0.0
    return gates


def _batch(x: Sizes) -> int:
    return x.batch


def _heads(x: Sizes) -> int:
    return x.heads


def _queries(x: Sizes) -> int:
    return x.n_q


def _keys(x: Sizes) -> int:
    return x.n_k


def _line(x: Sizes) -> int:
    return x.n_q + x.n_k


def _float(name: str, rank: int) -> Capture:
    return Capture(name, "float", (None,) * rank)


def _int(name: str, rank: int) -> Capture:
    return Capture(name, "int", (None,) * rank)


def _spec(heads: Heads | None = None, **parts: object) -> AttentionSpec:
    heads = heads or Heads(4, 4, 4, 32, 32)
    scale = ex.number(heads.d_qk**-0.5)
    return AttentionSpec(**{"heads": heads, "score": scale * s, **parts})  # type: ignore[arg-type]


_S = ex.number(32**-0.5) * s
_CAUSAL = k <= q
_PAD = sp.Ne(ex.load("pad", b, k, integer=True), 0)
_SAME = sp.Eq(ex.load("doc", b, q, integer=True), ex.load("doc", b, k, integer=True))
_ROUTE = ex.load("gain", b, h, q)
_CHOSEN = sp.Ne(_ROUTE, 0)
_ALIBI = ex.load("slope", h) * (k - q)
_TABLE = Heads(5, 3, 2, 16, 24, (0, 2, 1, 1, 0), (1, 0, 0, 1, 1))


def _empty(policy: EmptyRow) -> Case:
    keep = sp.And(_PAD, k <= q + n_k - n_q)
    spec = _spec(keep=keep, empty_row=policy, captures=(_int("pad", 2),), returns=("lse",))
    return Case(f"empty_{policy.value}", spec, (_hard_padding,))


CASES: tuple[Case, ...] = (
    Case("plain", _spec(score=s)),
    Case("scale", _spec()),
    Case("causal", _spec(keep=_CAUSAL)),
    Case("causal_bottom_right", _spec(keep=k <= q + n_k - n_q, empty_row=EmptyRow.ZERO)),
    Case("window", _spec(keep=sp.And(_CAUSAL, k > q - 20), empty_row=EmptyRow.ZERO)),
    Case("window_both_sides", _spec(keep=sp.And(k < q + 9, k > q - 9), empty_row=EmptyRow.ZERO)),
    Case("window_per_head", _spec(keep=sp.And(_CAUSAL, k >= q - 8 * (h + 1)), empty_row=EmptyRow.ZERO)),
    Case("prefix", _spec(keep=sp.Or(k < 5, _CAUSAL))),
    Case("prefix_or_window", _spec(keep=sp.And(_CAUSAL, sp.Or(k < 4, k > q - 16)))),
    Case("dilated", _spec(keep=sp.And(_CAUSAL, sp.Eq(ex.Mod(q - k, 3), 0)))),
    Case("blocks", _spec(keep=sp.Eq(ex.FloorDiv(q, 7), ex.FloorDiv(k, 7)), empty_row=EmptyRow.ZERO)),
    Case("offset", _spec(keep=k <= q + ex.scalar("start"), scalars=("start",)), (), (11,)),
    Case("padding", _spec(keep=_PAD, captures=(_int("pad", 2),)), (_padding,)),
    Case("padding_causal", _spec(keep=sp.And(_PAD, _CAUSAL), captures=(_int("pad", 2),)), (_padding,)),
    Case(
        "bias",
        _spec(score=_S + ex.load("bias", h, q, k), captures=(_float("bias", 3),)),
        (_randn(_heads, _queries, _keys),),
    ),
    Case(
        "line",
        _spec(score=s + ex.load("line", h, k - q + n_q - 1), captures=(_float("line", 2),)),
        (_randn(_heads, _line),),
    ),
    Case(
        "backward_line",
        _spec(score=_S + ex.load("line", h, q - k + n_k - 1), captures=(_float("line", 2),)),
        (_randn(_heads, _line),),
    ),
    Case(
        "buckets",
        _spec(
            score=_S + ex.load("table", ex.Minimum(ex.FloorDiv(ex.Maximum(q - k, 0), 5), 7), h),
            captures=(_float("table", 2),),
        ),
        (_randn(8, _heads),),
    ),
    Case(
        "guarded",
        _spec(score=_S + ex.Where(_CAUSAL, ex.load("line", q - k), sp.Rational(1, 2)), captures=(_float("line", 1),)),
        (_randn(_line),),
    ),
    Case("alibi", _spec(score=_S + _ALIBI, keep=_CAUSAL, captures=(_float("slope", 1),)), (_randn(_heads),)),
    Case("softcap", _spec(score=20 * sp.tanh(s / 40), keep=sp.And(_CAUSAL, k > q - 30), empty_row=EmptyRow.ZERO)),
    Case("finite_minimum", _spec(score=ex.Where(k < 3, ex.number(-3.4028234663852886e38), _S))),
    Case("gqa", _spec(Heads(8, 2, 2, 32, 32), keep=_CAUSAL)),
    Case("gqa_group_of_two", _spec(Heads(6, 3, 3, 16, 16))),
    Case("gqa_group_of_three", _spec(Heads(6, 2, 2, 16, 16))),
    Case("head_table", _spec(_TABLE)),
    Case("wide_values", _spec(Heads(2, 2, 2, 16, 48), keep=_CAUSAL)),
    Case("narrow_values", _spec(Heads(2, 2, 2, 64, 20))),
    Case("width_40", _spec(Heads(2, 2, 2, 40, 40))),
    Case("width_80", _spec(Heads(2, 2, 2, 80, 80), keep=_CAUSAL)),
    Case("width_96", _spec(Heads(2, 1, 1, 96, 96))),
    Case(
        "sink",
        _spec(normalizer=Softmax(ex.load("sink", h)), keep=_CAUSAL, captures=(_float("sink", 1),), returns=("lse",)),
        (_randn(_heads),),
    ),
    Case("gate", _spec(gate=ex.load("gain", h), captures=(_float("gain", 1),)), (_randn(_heads),)),
    Case(
        "gate_per_row",
        _spec(gate=ex.load("gain", b, h, q), captures=(_float("gain", 3),)),
        (_randn(_batch, _heads, _queries),),
    ),
    Case(
        "routed",
        _spec(gate=_ROUTE, rows=_CHOSEN, keep=_CAUSAL, captures=(_float("gain", 3),), returns=("lse",)),
        (_routes,),
    ),
    Case(
        "routed_groups",
        _spec(
            Heads(8, 2, 2, 32, 32), gate=_ROUTE, rows=_CHOSEN, captures=(_float("gain", 3), _int("pad", 2)),
            keep=sp.And(_PAD, k > q + n_k - n_q - 40, k <= q + n_k - n_q), empty_row=EmptyRow.UNIFORM,
        ),
        (_routes, _hard_padding),
    ),
    Case(
        "routed_halves",
        _spec(_TABLE, rows=sp.Eq(ex.Mod(q + h, 2), 0), keep=sp.Or(k < 5, _CAUSAL)),
    ),
    Case(
        "documents",
        _spec(keep=sp.And(_SAME, _CAUSAL), captures=(_int("doc", 2),), empty_row=EmptyRow.ZERO),
        (_documents,),
    ),
    Case(
        "additive_mask",
        _spec(score=_S + ex.load("mask", b, q, k), captures=(_float("mask", 3),)),
        (_additive,),
    ),
    _empty(EmptyRow.ZERO),
    _empty(EmptyRow.NAN),
    _empty(EmptyRow.UNIFORM),
    Case("lse", _spec(keep=_CAUSAL, returns=("lse",))),
    Case("sigmoid", _spec(score=1 / (1 + sp.exp(-_S + sp.log(2))), normalizer=Pointwise())),
    Case("relu", _spec(score=ex.Maximum(_S, 0), normalizer=Pointwise(ex.n_k), keep=_CAUSAL)),
    Case("squared_relu", _spec(score=ex.Maximum(_S, 0) ** 2, normalizer=Pointwise(ex.Maximum(ex.t, 1)), returns=("lse",))),
    Case(
        "softplus",
        _spec(
            score=sp.log(1 + sp.exp(-sp.Abs(_S))) + ex.Maximum(_S, 0), normalizer=Pointwise(ex.t), keep=_PAD,
            captures=(_int("pad", 2),), empty_row=EmptyRow.ZERO,
        ),
        (_padding,),
    ),
    Case("signed", _spec(score=sp.Abs(_S), weight=sp.sign(s), keep=_CAUSAL)),
    Case("linear", _spec(score=_S, normalizer=Pointwise(ex.Maximum(sp.Abs(ex.t), 1)))),
    Case("linear_absolute", _spec(score=_S, normalizer=Pointwise(1 + ex.a), keep=_CAUSAL, returns=("lse",))),
    Case(
        "decay",
        _spec(
            score=_S * sp.exp(-ex.load("rate", h) ** 2 * (q - k) / 8), keep=_CAUSAL, normalizer=Pointwise(),
            captures=(_float("rate", 1),),
        ),
        (_randn(_heads),),
    ),
    Case(
        "weight_per_key",
        _spec(weight=ex.load("gain", b, k), captures=(_float("gain", 2),), empty_row=EmptyRow.ZERO, keep=_CAUSAL),
        (_randn(_batch, _keys),),
    ),
    Case(
        "weight_of_score",
        _spec(score=s, weight=sp.tanh(s / 4), normalizer=Softmax(ex.load("sink", h)), captures=(_float("sink", 1),)),
        (_randn(_heads),),
    ),
    Case(
        "pointwise_gated",
        _spec(
            score=ex.Maximum(_S, 0), weight=ex.load("gain", h, k), gate=ex.load("gain", h, 0),
            normalizer=Pointwise(1 + ex.t), keep=k <= q + n_k - n_q, captures=(_float("gain", 2),),
        ),
        (_randn(_heads, _keys),),
    ),
)  # fmt: skip


_CHOICE = {"block": 16, "tile": 16, "own": q + n_k - n_q, "first": 1}
_GROUPED = Heads(6, 2, 2, 32, 16)


def _selected(name: str, rule: str, amount: sp.Expr, *makers: Maker, **parts: object) -> Case:
    own = {"keep": k <= q + n_k - n_q, "empty_row": EmptyRow.ZERO, "returns": ("lse",)}
    captures = (_int("pad", 2),) if makers else ()
    spec = _spec(_GROUPED, captures=captures, **{**own, "select": Select(rule, (amount,), **_CHOICE), **parts})  # type: ignore[arg-type]
    return Case(name, spec, makers)


# Selections by rules of their own: what a backend runs is the mask that they are.
SELECTED: tuple[Case, ...] = (
    _selected("top_blocks", "topk", sp.Integer(2)),
    _selected("mass_of_blocks", "mass", sp.Rational(1, 2), keep=sp.true, empty_row=EmptyRow.NAN),
    _selected("top_blocks_padded", "topk", sp.Integer(2), _hard_padding, keep=sp.And(_PAD, k <= q + n_k - n_q)),
)


_BOTH = ("lse", "entropy")
_AGAIN = ("max", "log_sum")


def _observed(name: str, policy: EmptyRow, *returns: str, heads: Heads | None = None, **parts: object) -> Case:
    """Rows of the first entry of the batch have no key; a window, bottom right."""
    keep = sp.And(_PAD, k > q + n_k - n_q - 30, k <= q + n_k - n_q)
    own = {"keep": keep, "empty_row": policy, "captures": (_int("pad", 2),), "returns": returns}
    return Case(name, _spec(heads, **{**own, **parts}), (_hard_padding,))


# Side outputs of rows; those of pairs are made of the same cases (`conformance/test_side.py`).
OBSERVED: tuple[Case, ...] = (
    Case("entropy", _spec(keep=_CAUSAL, returns=_BOTH)),
    Case("entropy_alone", _spec(score=20 * sp.tanh(s / 40), returns=("entropy",))),
    Case(
        "entropy_sink",
        _spec(normalizer=Softmax(ex.load("sink", h)), keep=sp.And(_CAUSAL, k > q - 20), captures=(_float("sink", 1),),
              returns=(*_BOTH, *_AGAIN)),
        (_randn(_heads),),
    ),
    _observed("entropy_zero", EmptyRow.ZERO, *_BOTH, *_AGAIN, heads=Heads(6, 2, 2, 16, 24), weight=k + 1),
    _observed("entropy_nan", EmptyRow.NAN, "entropy", heads=_TABLE),
    _observed("entropy_uniform", EmptyRow.UNIFORM, *_AGAIN, "entropy"),
    Case("entropy_absorbed", _spec(score=ex.Where(k < 9, ex.number(-3.4028234663852886e38), _S), returns=(*_AGAIN, "entropy"))),
    Case(
        "entropy_routed",
        _spec(gate=_ROUTE, rows=_CHOSEN, keep=_CAUSAL, captures=(_float("gain", 3),), returns=(*_BOTH, *_AGAIN)),
        (_routes,),
    ),
)  # fmt: skip


def case(name: str) -> Case:
    """The case of this name."""
    return next(c for c in (*CASES, *SELECTED, *OBSERVED) if c.name == name)


def with_heads(item: Case, heads: Heads) -> Case:
    """The same case at other head counts and widths."""
    return replace(item, spec=replace(item.spec, heads=heads))
