"""Rewrites of regions. `PIPELINE` is the ordered list of those that run by default."""

from __future__ import annotations

from attnopt.passes import bias_algebra, gates, shared_heads
from attnopt.passes.base import Rewrite

PIPELINE: tuple[Rewrite, ...] = (bias_algebra.RULE, shared_heads.RULE, gates.RULE)
