"""The attentions that are compiled ahead of time when no spec is named."""

from __future__ import annotations

from collections.abc import Iterator

import sympy as sp

from attnopt import expr as ex
from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.cpp_loads import k_axes
from attnopt.expr import b, h, k, n_k, n_q, q, s
from attnopt.spec import AttentionSpec, Capture, EmptyRow, Heads, Pointwise, Softmax

# Of captures, by kind.
_DTYPES = {"float": "float32", "int": "int64", "bool": "bool"}
_CAUSAL = k <= q
_PAD = Capture("pad", "int", (None, None))
_KEPT = sp.Ne(ex.load("pad", b, k, integer=True), 0)
_DOC = Capture("doc", "int", (None, None))
_SAME = sp.Eq(ex.load("doc", b, q, integer=True), ex.load("doc", b, k, integer=True))


def standard(heads: Heads | None = None) -> Iterator[tuple[str, AttentionSpec]]:
    """Named specs: the usual masks, biases and normalisers, by default with 32 query heads on 8 of width 128."""
    heads = heads or Heads(32, 8, 8, 128, 128)
    scaled = ex.number(heads.d_qk**-0.5) * s
    bias = ex.load("bias", h, q, k)
    line = ex.load("line", h, k - q + n_q - 1)
    rows: tuple[tuple[str, dict[str, object]], ...] = (
        ("dense", {}),
        ("causal", {"keep": _CAUSAL, "returns": ("lse",)}),
        ("causal_bottom_right", {"keep": k <= q + n_k - n_q, "empty_row": EmptyRow.ZERO}),
        ("window", {"keep": sp.And(_CAUSAL, k > q - 1024)}),
        ("prefix", {"keep": sp.Or(k < 256, _CAUSAL)}),
        ("padding", {"keep": _KEPT, "captures": (_PAD,), "empty_row": EmptyRow.ZERO}),
        ("padding_causal", {"keep": sp.And(_KEPT, _CAUSAL), "captures": (_PAD,), "empty_row": EmptyRow.UNIFORM}),
        ("documents", {"keep": sp.And(_SAME, _CAUSAL), "captures": (_DOC,)}),
        ("bias", {"score": scaled + bias, "captures": (Capture("bias", "float", (None,) * 3),)}),
        ("line", {"score": scaled + line, "captures": (Capture("line", "float", (None, None)),)}),
        ("alibi", {"score": scaled + ex.load("slope", h) * (k - q), "keep": _CAUSAL,
                   "captures": (Capture("slope", "float", (None,)),)}),
        ("softcap", {"score": 50 * sp.tanh(scaled / 50), "keep": _CAUSAL}),
        ("sink", {"normalizer": Softmax(ex.load("sink", h)), "keep": sp.And(_CAUSAL, k > q - 128),
                  "captures": (Capture("sink", "float", (None,)),)}),
        ("gate", {"gate": ex.load("gate", b, h, q), "keep": _CAUSAL,
                  "captures": (Capture("gate", "float", (None,) * 3),)}),
        ("routed", {"gate": ex.load("gate", b, h, q), "rows": sp.Ne(ex.load("gate", b, h, q), 0), "keep": _CAUSAL,
                    "captures": (Capture("gate", "float", (None,) * 3),)}),
        ("linear", {"score": s, "normalizer": Pointwise(ex.Maximum(ex.t, sp.Rational(1, 10**6))), "keep": _CAUSAL}),
        ("retention", {"score": scaled * sp.exp(ex.load("rate", h) * (q - k)), "normalizer": Pointwise(),
                       "keep": q - k >= 0, "captures": (Capture("rate", "float", (None,)),)}),
        ("sigmoid", {"score": 1 / (1 + sp.exp(-scaled)), "normalizer": Pointwise(), "keep": _CAUSAL}),
    )  # fmt: skip
    for name, parts in rows:
        yield name, AttentionSpec(**{"heads": heads, "score": scaled, **parts})  # type: ignore[arg-type]


def layout_for(spec: AttentionSpec, dtype: str) -> Layout:
    """The usual layout of a spec's inputs: captures in fp32, int64 or bool, keys next to one another."""
    made = zip(spec.captures, k_axes(spec), strict=True)
    return Layout(dtype, tuple(CaptureLayout(_DTYPES[c.kind], None if axis is None else 1) for c, axis in made))
