"""What a code generator is given beside the spec, and what it gives back. Free of torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

ABI = 1


@dataclass(frozen=True)
class CaptureLayout:
    """Dtype name of a captured tensor, and its stride along the index that carries `k`: 0, 1 or None (any)."""

    dtype: str
    k_stride: int | None


@dataclass(frozen=True)
class Layout:
    """The part of the inputs that a kernel is specialised for: dtypes and unit strides, never sizes.

    `page`: how many keys stand together where a table says which page of a pool holds which keys of which batch entry;
    0 where all keys of a batch entry stand in one tensor. `new`: whether keys in a tensor of their own follow those in
    pages.
    """

    dtype: str
    captures: tuple[CaptureLayout, ...] = ()
    page: int = 0
    new: bool = False


@dataclass(frozen=True)
class Plan:
    """The schedule of a CPU kernel.

    Attributes:
        block_q: queries of a tile; in the `stream` form rows of all heads of a group.
        block_k: keys of a tile.
        lanes: floats of a vector: 4, 8 or 16.
        rows: rows of the register tile.
        form: `tile` packs keys and values for many queries; `whole` does so for keys that are one tile; `stream` reads
            them once, in place, for few queries.
        listed: keys of one entry of the list that says which keys a tile visits; 0 where coordinates say it.
    """

    block_q: int = 48
    block_k: int = 128
    lanes: int = 8
    rows: int = 6
    form: str = "tile"
    listed: int = 0


@dataclass(frozen=True)
class Kernel:
    """Generated source with what it was generated from. `key` identifies the text and its inputs."""

    language: str
    source: str
    spec_key: str
    layout: Layout
    plan: Plan

    @cached_property
    def key(self) -> str:
        """sha256 over language, ABI and source."""
        return hashlib.sha256(f"{self.language}\n{ABI}\n{self.source}".encode()).hexdigest()
