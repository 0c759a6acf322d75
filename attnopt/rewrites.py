"""The rewrites that a user names in `optimize(..., rewrites=[...])`."""

from __future__ import annotations

from attnopt.passes.prune_heads import PruneHeads

__all__ = ["PruneHeads"]
