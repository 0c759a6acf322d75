"""Keys and values in pages: where Triton kernels find those of a batch entry, and how many there are.

A pool `[pages, H, PAGE, d]` holds pages of all batch entries. `page_table [B, slots]` says which page of the pool holds
keys `slot * PAGE ...` of an entry, `key_lengths [B]` how many keys it has. That number is `n_k` of its rows: masks that
are aligned to the last key, ranges and normalisers follow each entry's own length. Pages and lengths that are out of
range are brought inside, so that no table makes a kernel read outside the pool.
"""

from __future__ import annotations

import sympy as sp

from attnopt.codegen.base import Layout
from attnopt.spec import AttentionSpec, Pointwise

# The tensors that come with pages: name, dtype, rank. What a capture or scalar may not be called.
TENSORS = (("page_table", "int32", 2), ("key_lengths", "int32", 1))
NAMES = tuple(name for name, _, _ in TENSORS)


def unsupported(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why a spec has no kernel that reads pages; None if it has, or if the layout has none."""
    if not layout.page:
        return None
    if layout.page < 0:
        return f"a page holds at least one key; this one would hold {layout.page}"
    taken = sorted({*NAMES} & {*(c.name for c in spec.captures), *spec.scalars})
    return f"with pages {taken[0]!r} is no name of a capture or scalar" if taken else None


def no_forward(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why the forward template has no kernel that reads pages, where the decode template has one; None if it has."""
    if layout.page and spec.rows != sp.true:
        return "with pages all rows are computed, as the decode kernels do"
    return None


def entry(page: int) -> list[str]:
    """Statements that begin a kernel once `b` is known: `n_k`, and where its part of the table begins."""
    if not page:
        return []
    return [
        "n_k = tl.load(key_lengths_ptr + b * key_lengths_stride0)",
        "n_k = tl.minimum(tl.maximum(n_k, 0), n_slots * PAGE)",
        "slots = page_table_ptr + tl.cast(b, tl.int64) * page_table_stride0",
    ]


def values_of(keys: str) -> list[str]:
    """Statements that make the values of `keys` that are `inside`, each of which is looked up."""
    return [
        f"page = {_page(keys)}",
        f"values_at = v_base + page * v_stride0 + {keys} % PAGE * v_stride2 + dv[None, :] * v_stride3",
        "values = tl.load(values_at, mask=inside, other=0.0)",
    ]


def whole_tiles(page: int, block_n: int) -> bool:
    """Whether a tile of keys, which begins at a multiple of its size, lies in one page."""
    return page % block_n == 0


def place(page: int, block_n: int) -> list[str]:
    """Statements before the loads of the tile at `k0`: its `page`, or those of each of its keys."""
    if whole_tiles(page, block_n):
        return ["slot = tl.cast(k0, tl.int32)", f"page = {_page('slot')}"]
    places = (f"{x}_at = page * {x}_stride0 + slot % PAGE * {x}_stride2" for x in "kv")
    return ["slot = k0 + tl.arange(0, BLOCK_N)", f"page = {_page('slot')}", *places]


def _page(keys: str) -> str:
    return f"page_of(slots, {keys}, n_k, n_pages, page_table_stride1)"


def address(name: str, page: int, block_n: int) -> str:
    """The address of the tile of keys (`k`) or values (`v`)."""
    if whole_tiles(page, block_n):
        return f"{name}_base + page * {name}_stride0 + slot % PAGE * {name}_stride2 + {name}_offsets"
    across = "[None, :] + d[:, None] * k_stride3" if name == "k" else "[:, None] + dv[None, :] * v_stride3"
    return f"{name}_base + {name}_at{across}"


def nothing(spec: AttentionSpec, page: int) -> list[str]:
    """Statements after `result`: an entry without any key yields zeros, whatever rows without kept keys do."""
    if not page:
        return []
    lines = ["result = tl.where(n_k > 0, result, 0.0)"]
    if "lse" in spec.returns and isinstance(spec.normalizer, Pointwise):  # that of a softmax is its sink's, or -inf
        lines.append('lse = tl.where(n_k > 0, lse, float("-inf"))')
    return lines
