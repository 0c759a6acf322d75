"""The spelling matrix: ways to write attention, and the spec that each must be read as."""

from __future__ import annotations

from tests.spellings import (
    biases,
    chunks,
    contractions,
    flex,
    layouts,
    masks,
    modules,
    normalisers,
    rare,
    scales,
    sdpa,
    synonyms,
)
from tests.spellings.row import Spelling

GROUPS = (scales, contractions, layouts, masks, biases, normalisers, sdpa, modules, flex, rare, synonyms, chunks)
SPELLINGS: tuple[Spelling, ...] = tuple(row for group in GROUPS for row in group.ROWS)

__all__ = ["GROUPS", "SPELLINGS", "Spelling"]
