"""The weights of an attention as a spec of their own: without what comes after them. Free of torch."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt.spec import AttentionSpec


def weights_of(spec: AttentionSpec) -> AttentionSpec:
    """The spec, canonical, without factors of weights, gates, dropout and side outputs."""
    return replace(spec, returns=(), weight=sp.S.One, gate=sp.S.One, dropout=0.0).canonical()
