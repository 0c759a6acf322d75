"""The rewrites that a user names in `optimize(..., rewrites=[...])`, and the tolerance they are held to."""

from __future__ import annotations

from typing import Any

from attnopt.factor.rewrite import FactorBias
from attnopt.linearize.rewrite import Linearize
from attnopt.mix.rewrite import MixHeads
from attnopt.passes.prune_heads import PruneHeads
from attnopt.passes.share_kv import ShareKV
from attnopt.passes.tolerance import Tolerance, next_token_loss
from attnopt.sparsify.rewrite import Sparsify

__all__ = ["FactorBias", "Linearize", "MixHeads", "PruneHeads", "ShareKV", "Sparsify", "Tolerance", "next_token_loss"]

_LATER = ("Auto",)


def __getattr__(name: str) -> Any:
    there = ", ".join(__all__)
    if name in _LATER:
        raise AttributeError(f"attnopt.rewrites.{name} is not available in this version; there are {there}.")
    raise AttributeError(f"module 'attnopt.rewrites' has no attribute {name!r}; there are {there}.")
