"""A spec written as mathematics, and its mask in words: what a person checks a site against."""

from __future__ import annotations

import functools

import sympy as sp

from attnopt.analysis.masks import describe
from attnopt.normalizer import Mixed, Pointwise
from attnopt.readable import show
from attnopt.spec import AttentionSpec


def formula(spec: AttentionSpec) -> str:
    """`out[b, h, q] = sum of softmax(s/8) * V[b, h//4, k] over k where k <= q, with s = Q[b, h, q]·K[b, h//4, k]`."""
    return f"out[b, h, q] = {' + '.join(_term(term) for term in spec.terms)}"


def _term(spec: AttentionSpec) -> str:
    heads = spec.heads
    key, value = _head(heads.q, heads.k, heads.k_map, "key"), _head(heads.q, heads.v, heads.v_map, "value")
    factors = [_weights(spec), f"V[b, {value}, k]"]
    factors[1:1] = [_factor(spec.weight)] if spec.weight != 1 else []
    total = f"sum of {' * '.join(factors)} over k"
    kept = [] if spec.keep == sp.true else [show(spec.keep)]
    if spec.select is not None:
        kept.append(f"block k//{spec.select.block} is chosen for tile q//{spec.select.tile}")
    total += f" where {' and '.join(kept)}" if kept else ""
    normalizer = spec.normalizer
    if isinstance(normalizer, Pointwise) and normalizer.divide != 1:
        total = f"({total}) / {_factor(normalizer.divide)}"
    if spec.gate != 1:
        total = f"{_factor(spec.gate)} * ({total})"
    total += "" if spec.rows == sp.true else f" where {show(spec.rows)}, else 0"
    return f"{total}, with s = Q[b, h, q]·K[b, {key}, k]"


def _weights(spec: AttentionSpec) -> str:
    normalizer = spec.normalizer
    if isinstance(normalizer, Pointwise):
        return _factor(spec.score)
    if isinstance(normalizer, Mixed):
        count = normalizer.features
        return f"normalised(exp({show(spec.score)}) if {show(normalizer.near)} else last {count} columns of Q·K)"
    sink = "" if normalizer.sink is None else f"; sink {show(normalizer.sink)}"
    return f"softmax({show(spec.score)}{sink})"


def _factor(expr: sp.Basic) -> str:
    text = show(expr)
    return f"({text})" if isinstance(expr, (sp.Add, sp.Mul)) else text


def _head(queries: int, count: int, table: tuple[int, ...], name: str) -> str:
    """The head that query head `h` reads, as a closed form where there is one."""
    if count == 1 or not any(table):
        return "0"
    if table == tuple(range(queries)):
        return "h"
    if queries % count == 0 and table == tuple(h // (queries // count) for h in range(queries)):
        return f"h//{queries // count}"
    return f"{name}_head[h]"


@functools.lru_cache(maxsize=256)
def mask_in_words(spec: AttentionSpec) -> str:
    """What the mask is: `causal`, `every key`, a window, padding, or the condition itself."""
    words = describe(spec)
    if words == "all keys":
        return "every query attends to every key"
    if isinstance(spec.normalizer, Pointwise) or all(term.keep == sp.true for term in spec.terms):
        return words
    return f"{words}; a row without any key gives {_empty(spec)}"


def _empty(spec: AttentionSpec) -> str:
    return {"zero": "zeros", "nan": "NaN", "uniform": "the mean of all values"}[spec.empty_row.value]
