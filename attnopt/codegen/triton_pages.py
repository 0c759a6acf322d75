"""Keys and values in pages: where Triton kernels find those of a batch entry, and how many there are.

A pool `[pages, H, PAGE, d]` holds pages of all batch entries. `page_table [B, slots]` says which page of the pool holds
keys `slot * PAGE ...` of an entry, `key_lengths [B]` how many keys it has. That number is `n_k` of its rows: masks that
are aligned to the last key, ranges and normalisers follow each entry's own length. Pages and lengths that are out of
range are brought inside, so that no table makes a kernel read outside the pool.

With `layout.new` a second segment follows: `new_k` and `new_v [B, H, n_new, d]`, keys that are not in the pool yet.
"""

from __future__ import annotations

import sympy as sp

from attnopt.codegen.base import Layout
from attnopt.spec import AttentionSpec, Pointwise

# The tensors that come with pages: name, dtype, rank. What a capture or scalar may not be called.
TENSORS = (("page_table", "int32", 2), ("key_lengths", "int32", 1))
NEW = ("new_k", "new_v")


def tensors(layout: Layout) -> list[tuple[str, str, int]]:
    """Name, dtype and rank of what comes with pages."""
    if not layout.page:
        return []
    return [*TENSORS, *((name, layout.dtype, 4) for name in NEW if layout.new)]


def sizes(layout: Layout) -> list[str]:
    """The sizes that come instead of `n_k`."""
    return ["n_pages", "n_slots", *["n_new"] * layout.new] if layout.page else ["n_k"]


def unsupported(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why a spec has no kernel that reads pages; None if it has, or if the layout has none."""
    if not layout.page:
        return None
    if layout.page < 0:
        return f"a page holds at least one key; this one would hold {layout.page}"
    more = [name for name in spec.returns if name != "lse"]
    if more:
        return f"with pages there is no {', '.join(more)}"
    taken = sorted({name for name, _, _ in tensors(layout)} & {*(c.name for c in spec.captures), *spec.scalars})
    return f"with pages {taken[0]!r} is no name of a capture or scalar" if taken else None


def no_forward(spec: AttentionSpec, layout: Layout) -> str | None:
    """Why the forward template has no kernel that reads pages, where the decode template has one; None if it has."""
    if layout.page and spec.rows != sp.true:
        return "with pages all rows are computed, as the decode kernels do"
    return None


def entry(layout: Layout) -> list[str]:
    """Statements that begin a kernel once `b` is known: `n_k`, and where its part of the table begins."""
    if not layout.page:
        return []
    held = _held(layout)
    return [
        f"{held} = tl.load(key_lengths_ptr + b * key_lengths_stride0)",
        f"{held} = tl.minimum(tl.maximum({held}, 0), n_slots * PAGE)",
        *(["n_k = n_held + n_new"] if layout.new else []),
        "slots = page_table_ptr + tl.cast(b, tl.int64) * page_table_stride0",
    ]


def _held(layout: Layout) -> str:
    """How many keys of an entry stand in pages."""
    return "n_held" if layout.new else "n_k"


def new_bases(layout: Layout) -> list[str]:
    """Where the new keys and values of the head begin, and the offsets within a tile of them."""
    if not layout.new:
        return []
    base = (
        "new_{0}_base = new_{0}_ptr + tl.cast(b, tl.int64) * new_{0}_stride0 + tl.cast({1}, tl.int64) * new_{0}_stride1"
    )
    return [
        base.format("k", "key_head"),
        base.format("v", "value_head"),
        "new_k_offsets = d[:, None] * new_k_stride3 + tl.arange(0, BLOCK_N)[None, :] * new_k_stride2",
        "new_v_offsets = tl.arange(0, BLOCK_N)[:, None] * new_v_stride2 + dv[None, :] * new_v_stride3",
    ]


# The loop over new keys.
LATER = [("new_first", "new_last", True)]


def segments(last: str, full: bool) -> list[str]:
    """From the range of all keys, which ends at `last`, to `[new_first, new_last)` and what is left of it in pages."""
    first = {"last": "first", "end": "begin"}[last]
    lines = [
        "# What stands in pages, and what comes behind.",
        f"new_first = tl.maximum({first}, n_held)",
        f"new_last = {last}",
        f"{last} = tl.maximum(tl.minimum({last}, n_held), {first})",
    ]
    if full:
        lines += [
            f"full_first = tl.minimum(full_first, {last})",
            "full_last = tl.maximum(tl.minimum(full_last, n_held // BLOCK_N * BLOCK_N), full_first)",
        ]
    return lines


def values_of(keys: str, layout: Layout) -> list[str]:
    """Statements that make the values of `keys` that are `inside`, each of which is looked up."""
    lines = [
        f"page = {_page(keys, layout)}",
        f"values_at = v_base + page * v_stride0 + {keys} % PAGE * v_stride2 + dv[None, :] * v_stride3",
    ]
    if layout.new:
        at = f"tl.cast({keys} - n_held, tl.int64) * new_v_stride2"
        lines += [
            f"values_new = new_v_base + {at} + dv[None, :] * new_v_stride3",
            f"values_at = tl.where({keys} < n_held, values_at, values_new)",
        ]
    return [*lines, "values = tl.load(values_at, mask=inside, other=0.0)"]


def whole_tiles(layout: Layout, block_n: int) -> bool:
    """Whether a tile of keys, which begins at a multiple of its size, lies in one page."""
    return layout.page % block_n == 0


def place(layout: Layout, block_n: int) -> list[str]:
    """Statements before the loads of the tile at `k0`: its `page`, or those of each of its keys."""
    found = f"page = {_page('slot', layout)}"
    if whole_tiles(layout, block_n):
        return ["slot = tl.cast(k0, tl.int32)", found]
    places = (f"{x}_at = page * {x}_stride0 + slot % PAGE * {x}_stride2" for x in "kv")
    return ["slot = k0 + tl.arange(0, BLOCK_N)", found, *places]


def _page(keys: str, layout: Layout) -> str:
    return f"page_of(slots, {keys}, {_held(layout)}, n_pages, page_table_stride1)"


def address(name: str, layout: Layout, block_n: int, new: bool) -> str:
    """The address of the tile of keys (`k`) or values (`v`), in pages or behind them."""
    if new:
        return f"new_{name}_base + tl.cast(k0 - n_held, tl.int64) * new_{name}_stride2 + new_{name}_offsets"
    if whole_tiles(layout, block_n):
        return f"{name}_base + page * {name}_stride0 + slot % PAGE * {name}_stride2 + {name}_offsets"
    across = "[None, :] + d[:, None] * k_stride3" if name == "k" else "[:, None] + dv[None, :] * v_stride3"
    return f"{name}_base + {name}_at{across}"


def nothing(spec: AttentionSpec, layout: Layout) -> list[str]:
    """Statements after `result`: an entry without any key yields zeros, whatever rows without kept keys do."""
    if not layout.page:
        return []
    lines = ["result = tl.where(n_k > 0, result, 0.0)"]
    if "lse" in spec.returns and isinstance(spec.normalizer, Pointwise):  # that of a softmax is its sink's, or -inf
        lines.append('lse = tl.where(n_k > 0, lse, float("-inf"))')
    return lines
