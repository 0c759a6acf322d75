"""Exact algebra of the score: what is added alike to every key of a row cancels in the softmax.

`softmax_k(x_k + c) = softmax_k(x_k)`. A row term goes only where nothing is left that it may have balanced: without
its `-slope*q`, ALiBi's `slope*(k - q)` would grow to thousands beside scores of a few units, and without its -10000 a
mask of `10000*mask - 10000` would add 10000 to the kept scores. A capture that nothing loads any more goes too.
"""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt import expr as ex
from attnopt.passes.base import Rule
from attnopt.region import Region
from attnopt.spec import AttentionSpec, Softmax

# Beside such a number a score of a few units has no digits left: where a whole row is masked by finfo.min, by a mask
# of queries for one, the source's row is uniform.
_ABSORBS = sp.Integer(10) ** 15


def apply(region: Region) -> Region:
    """The region with row terms cancelled; the same object if there are none."""
    spec = cancel_rows(region.spec)
    if spec is region.spec:
        return region
    kept = {c.name for c in spec.captures}
    return region.replace(spec=spec, captures={n: o for n, o in region.captures.items() if n in kept})


def cancel_rows(spec: AttentionSpec) -> AttentionSpec:
    """Drop finite terms of the score that are the same for every key. Not with a sink or a returned lse."""
    if spec.normalizer != Softmax() or spec.returns or spec.weight.has(ex.s):
        return spec
    terms = sp.Add.make_args(spec.score)
    kept = [t for t in terms if t.has(ex.s) or _varies(t)]
    if len(kept) == len(terms) or not all(t.has(ex.s) for t in kept):
        return spec
    score = sp.Add(*kept)
    parts = {**spec.expressions, "score": score}.values()
    names = set(ex.load_names(*parts))
    scalars = {x.name for part in parts for x in part.free_symbols}
    return replace(
        spec,
        score=score,
        captures=tuple(c for c in spec.captures if c.name in names),
        scalars=tuple(n for n in spec.scalars if n in scalars),
    ).canonical()


def _varies(term: sp.Expr) -> bool:
    """Whether the term depends on the key, may be infinite or NaN (which does not cancel), or swallows the scores."""
    # A loaded float may be infinite, and inf - inf is NaN in the source: only what is known to be finite cancels.
    loaded = any(not isinstance(load, ex.IntLoad) for load in term.atoms(ex.Load))
    divided = any(p.exp.is_negative and not p.base.is_number for p in term.atoms(sp.Pow))
    absorbs = any(abs(c) >= _ABSORBS for c in term.atoms(sp.Rational))
    return absorbs or loaded or divided or term.has(ex.k, sp.oo, ex.NEG_INF, sp.nan, sp.log)


RULE = Rule("bias_algebra", apply)
