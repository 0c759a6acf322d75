"""How a C++ kernel goes through the keys: by ranges that follow from coordinates, or by a list of blocks.

A list is an int32 tensor `[B or 1, H or 1, tiles, 2 + n]`: for each tile of queries the number of blocks of which every
key is kept by every query, the number of all blocks, and the blocks, those that are kept whole first.
"""

from __future__ import annotations

from attnopt.codegen.base import Plan

_RANGED = {
    "FULL_GIVEN": "",
    "MASKED_TILE": "k0 + begin[i] < range.full_lo || k0 + end[i] > range.full_hi",
    "MASKED_BLOCK": "k0 + lo < range.full_lo || k0 + hi > range.full_hi",
    "KEY_LIST": "",
    "VISIT_TILES": """\
  const KeyRange range = key_range(a, b, h, q0, q0 + rows);
  for (int64_t k0 = range.lo / kPanel * kPanel; k0 < range.hi; k0 += kBlockK)
    key_tile(a, b, h, q0, rows, k0, panels, values, t);""",
    "VISIT_BLOCKS": """\
  hi = minimum(hi, all.hi);
  for (int64_t k0 = maximum(lo, all.lo / kLanes * kLanes); k0 < hi; k0 += kBlockK)
    key_block(a, tile, ranges, k0, int(minimum(hi - k0, int64_t(kBlockK))), t);""",
    "CUT": """\
  const int64_t count = n_q <= kMostQ ? 1 : (n_q + kBlockQ - 1) / kBlockQ;
  const int64_t height = (n_q + count - 1) / (count > 0 ? count : 1);
  return {count, (height + kRows - 1) / kRows * kRows};""",
    "VISITED": "a.n_k",
    "SPAN": "kBlockK",
    "SPLIT_END": "minimum(lo + w.span, a.n_k)",
}
_LISTED = {
    "FULL_GIVEN": " bool full,",
    "MASKED_TILE": "!full",
    "MASKED_BLOCK": "!full",
    "KEY_LIST": """\
// What a tile of queries visits: how many blocks are kept whole, how many there are, and the blocks.
INLINE const int32_t* key_list(const Args& a, int64_t b, int64_t h, int64_t tile) {
  return a.list + b * a.list_stride[0] + h * a.list_stride[1] + tile * a.list_stride[2];
}
""",
    "VISIT_TILES": """\
  const int32_t* const list = key_list(a, b, h, q0 / kListQ);
  for (int i = 0; i < list[1]; ++i)
    key_tile(a, b, h, q0, rows, list[2 + i] * int64_t(kListK), panels, values, i < list[0], t);""",
    "VISIT_BLOCKS": """\
  // Places in the list, kListK keys each.
  const int32_t* const list = key_list(a, tile.b, tile.head, 0);
  hi = minimum(hi, list[1] * int64_t(kListK));
  for (int64_t place = lo; place < hi; place += kListK) {
    const int64_t i = place / kListK, first = list[2 + i] * int64_t(kListK);
    const int64_t last = minimum(first + kListK, all.hi);
    for (int64_t k0 = first; k0 < last; k0 += kBlockK)
      key_block(a, tile, ranges, k0, int(minimum(last - k0, int64_t(kBlockK))), i < list[0], t);
  }""",
    "CUT": "  return {(n_q + kListQ - 1) / kListQ, kListQ};",
    "VISITED": "a.list_most * int64_t(kListK)",
    "SPAN": "kListK",
    "SPLIT_END": "lo + w.span",
}


def visit_holes(plan: Plan) -> dict[str, str]:
    """The holes of the skeletons that say which keys are visited, and which of them have no mask."""
    return _LISTED if plan.listed else _RANGED


def list_constants(plan: Plan) -> list[str]:
    """Lines that name the sizes of a list's tiles and blocks."""
    if not plan.listed:
        return []
    return [f"constexpr int kListQ = {plan.block_q}, kListK = {plan.listed};  // tile of queries, block of keys"]


def list_fields(plan: Plan) -> list[str]:
    """Fields of the arguments."""
    return ["  const int32_t* list;", "  int64_t list_stride[3], list_most;"] if plan.listed else []


def list_reads(plan: Plan, position: int) -> list[str]:
    """Statements that read the fields: the list is the tensor at `position`, its strides come last."""
    if not plan.listed:
        return []
    return [
        f"  a.list = static_cast<const int32_t*>(tensors[{position}]);",
        "  for (int i = 0; i < 3; ++i) a.list_stride[i] = *meta++;",
        "  a.list_most = *meta++;",
    ]
