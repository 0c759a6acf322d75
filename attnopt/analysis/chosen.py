"""A selection as a mask: the choice of blocks is one more captured tensor, and `keep` asks it. Free of torch."""

from __future__ import annotations

from dataclasses import replace

import sympy as sp

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Capture


def lowered(spec: AttentionSpec) -> AttentionSpec:
    """The spec without `select`: the last capture, bool `[B, H, tiles, blocks]`, says what was chosen."""
    if spec.select is None:
        return spec
    taken = {*(c.name for c in spec.captures), *spec.scalars}
    name = next(n for n in ("chosen", *(f"chosen{i}" for i in range(len(taken)))) if n not in taken)
    places = ex.FloorDiv(ex.q, spec.select.tile), ex.FloorDiv(ex.k, spec.select.block)
    kept = sp.Ne(ex.load(name, ex.b, ex.h, *places, integer=True), 0)
    capture = Capture(name, "bool", (None, spec.heads.q, None, None))
    return replace(spec, keep=sp.And(spec.keep, kept), captures=(*spec.captures, capture), select=None).canonical()
