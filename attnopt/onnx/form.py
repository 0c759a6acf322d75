"""A spec in the words of the ONNX attention operators: a scale, a soft-cap, a bias, a mask. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp
from sympy.logic.boolalg import Boolean

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Heads, Softmax

CAUSAL = sp.Ge(ex.q - ex.k, 0)


@dataclass(frozen=True)
class Form:
    """`softmax(cap*tanh(scale*s/cap) + bias where keep)`, after queries are multiplied by `factor`.

    Attributes:
        scale: a positive number.
        factor: an expression in `b, h, q`, sizes and loads; 1 for nothing.
        cap: the soft-cap, a positive number; 0 for none.
        bias: what is added to the scores after the soft-cap, without `s`.
        keep: the mask. `causal`: whether it is the causal mask and nothing else (query i sees keys 0..i).
        window: of a causal mask with a constant window how many keys are seen, itself included; else 0.
        sink: a logit per head that joins the denominator; None for none.
        sink_varies: whether it is another for each batch entry or query.
        first_kept, own_kept: whether every query is proven to keep key 0, or the key at its own place.
        loads: whether the bias is read from tensors, and so may be -inf.
        grouped: whether heads are shared as ONNX shares them: `h // (query heads / key heads)`.
    """

    scale: float
    factor: sp.Expr
    cap: float
    bias: sp.Expr
    keep: Boolean
    causal: bool
    window: int
    sink: sp.Expr | None
    sink_varies: bool
    first_kept: bool
    own_kept: bool
    loads: bool
    grouped: bool


def form_of(spec: AttentionSpec) -> Form | str:
    """The form of the spec, or why it has none."""
    reason = _beyond(spec)
    if reason:
        return reason
    terms = sp.Add.make_args(spec.score)
    scored = sp.Add(*[t for t in terms if t.has(ex.s)])
    bias = sp.Add(*[t for t in terms if not t.has(ex.s)])
    scaled = _scaled(scored)
    if scaled is None:
        return f"no ONNX operator has this score: {ex.canon(spec.score)}"
    scale, factor, cap = scaled
    heads = spec.heads
    regular = heads.k == heads.v and heads == Heads(heads.q, heads.k, heads.v, heads.d_qk, heads.d_v)
    assert isinstance(spec.normalizer, Softmax)
    keep, sink = ex.canon(spec.keep), spec.normalizer.sink
    return Form(
        scale, factor, cap, bias, keep, keep == CAUSAL, _window(keep), sink,
        sink is not None and ex.depends(sink, ex.b, ex.q), always(keep, sp.S.Zero), always(keep, ex.q),
        bool(ex.loads(bias)) or bias.has(ex.NEG_INF), regular,
    )  # fmt: skip


def _beyond(spec: AttentionSpec) -> str:
    """What of the spec, the score apart, no operator says; empty for nothing."""
    if not isinstance(spec.normalizer, Softmax):
        return f"no ONNX operator has this normaliser: {spec.normalizer}"
    if spec.select is not None:
        return "no ONNX operator chooses the blocks of keys that a query visits"
    if spec.weight != 1:
        return "no ONNX operator changes the weights after the softmax"
    if spec.dropout:
        return "dropout is active"
    return "the logarithm of the denominator is wanted, which no ONNX operator gives" if spec.returns else ""


def _scaled(scored: sp.Expr) -> tuple[float, sp.Expr, float] | None:
    """Scale, factor and cap of the part of the score that has `s`; None if it is not of that form."""
    cap = sp.S.Zero
    if scored.has(sp.tanh):
        cap, inner = scored.as_coeff_Mul()
        if not isinstance(inner, sp.tanh) or not cap > 0:
            return None
        scored = cap * inner.args[0]
    coefficient = sp.expand(scored) / ex.s
    if coefficient.has(ex.s, sp.oo, sp.nan) or coefficient == 0:
        return None
    number, factor = coefficient.as_coeff_Mul()
    if ex.depends(factor, ex.k):
        return None
    if number < 0:
        number, factor = -number, -factor
    return float(number), factor, float(cap)


def _window(keep: Boolean) -> int:
    """`w` of a mask `k <= q and q < k + w`; 0 for any other."""
    parts = list(ex.conjuncts(keep))
    if len(parts) != 2 or CAUSAL not in parts:
        return 0
    other = next(p for p in parts if p != CAUSAL)
    width = sp.expand(other.args[0] - (ex.k - ex.q)) + 1 if isinstance(other, sp.Ge) else None
    return int(width) if width is not None and width.is_Integer and width > 0 and other.args[1] == 0 else 0


def always(keep: Boolean, place: sp.Expr) -> bool:
    """Whether the key at this place is proven to be kept by every query."""
    return bool(ex.canon(keep.subs(ex.k, place)) == sp.true)
