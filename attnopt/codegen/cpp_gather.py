"""C++ kernels that compute some query rows of a head: they are listed first, in order, and tiles are cut from the list.

Tiles of listed rows lie as densely as tiles of all rows, keys stay where they are, and masks see the true positions.
Rows that are not listed are written as zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy as sp

from attnopt.codegen.cpp_side_outputs import skipped_row
from attnopt.codegen.printer import Printer
from attnopt.spec import AttentionSpec

_ALL = {
    "RUN": "run",
    "PLACE": "q0 + r",
    "STEP": "r",
    "FIRST_QUERY": " + q0 * a.q_stride[2]",
    "BLOCK_RANGE": """\
    const int64_t first = q0 + i * kRows;
    const KeyRange range = key_range(a, b, h, first, minimum(first + kRows, q0 + rows));""",
    "TILE_ROWS": """\
  const int64_t q0 = tile * cut.height;
  const int rows = int(minimum(cut.height, a.n_q - q0));""",
    "HEAD_ROWS": "a.n_q",
    "HEAD_ROW": "q",
    "COUNT_GROUP": "group += key_head(h) == tile.head;",
    "GROUP_ROWS": "group * a.n_q",
    "GATHER": "",
}
_SOME = {
    "RUN": "run_rows",
    "PLACE": "t.place[r]",
    "STEP": "t.place[r]",
    "FIRST_QUERY": "",
    "BLOCK_RANGE": """\
    const int32_t* const place = t.place + i * kRows;
    const KeyRange range = key_range(a, b, h, place[0], place[left[i] - 1] + 1);""",
    "TILE_ROWS": """\
  const int64_t count = a.counts[b * kHeads + h];
  const Cut own = cut_queries(count);
  if (count == 0 || tile >= own.count) return;
  const int64_t q0 = tile * own.height;
  const int rows = int(minimum(own.height, count - q0));
  if (rows <= 0) return;
  memcpy(scratch.place, a.places + (b * kHeads + h) * a.n_q + q0, sizeof(int32_t) * rows);""",
    "HEAD_ROWS": "a.counts[tile.b * kHeads + h]",
    "HEAD_ROW": "a.places[(tile.b * kHeads + h) * a.n_q + q]",
    "COUNT_GROUP": "if (key_head(h) == tile.head) group += a.counts[tile.b * kHeads + h];",
    "GROUP_ROWS": "group",
    "GATHER": """
namespace {
// Whether a row of a head is computed.
INLINE bool is_wanted(const Args& a, int64_t b, int64_t h, int64_t q) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@WANTED@
}

// Lists the rows of each head that are computed, in order; the others are zero.
void list_rows(const Args& a, int64_t item, int32_t* places, int32_t* counts) {
  const int64_t b = item / kHeads, h = item % kHeads;
  int32_t* const list = places + item * a.n_q;
  int32_t found = 0;
  for (int64_t q = 0; q < a.n_q; ++q) {
    if (is_wanted(a, b, h, q)) {
      list[found++] = int32_t(q);
      continue;
    }
    Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
    for (int d = 0; d < kDv; ++d) write(out + d * a.out_stride[3], 0.0f);
@SKIPPED_ROW@
  }
  counts[item] = found;
}

int32_t run(const Args& given, int threads) {
  Args a = given;
  const int64_t heads = a.n_b * kHeads;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(int32_t) * heads * (a.n_q + 1))) return 1;
  int32_t *const places = static_cast<int32_t*>(memory), *const counts = places + heads * a.n_q;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < heads; ++item) list_rows(given, item, places, counts);
  a.places = places;
  a.counts = counts;
  const int32_t status = run_rows(a, threads);
  free(memory);
  return status;
}
}  // namespace
""",
}


def row_holes(spec: AttentionSpec, printer: Callable[[], Printer]) -> dict[str, str]:
    """The holes of the skeletons that say which rows a tile holds and where they stand."""
    if spec.rows == sp.true:
        return _ALL
    p = printer()
    value = p.cast(p.visit(spec.rows), "b", False)
    lines = [*p.row, *p.body, f"return {value.code};"]
    return {**_SOME, "WANTED": "\n".join(f"  {line}" for line in lines), "SKIPPED_ROW": skipped_row(spec)}


def row_fields(spec: AttentionSpec) -> list[str]:
    """Fields of the arguments: for each head the rows that are computed, `[B, H, n_q]`, and how many `[B, H]`."""
    return [] if spec.rows == sp.true else ["  const int32_t *places, *counts;"]


# What a tile remembers of its rows.
ROW_SCRATCH = "\n  int32_t place[kTileQ];"
# How the form by ranges visits the keys of a tile of listed rows.
VISIT_TILES = """\
  const KeyRange range = key_range(a, b, h, t.place[0], t.place[rows - 1] + 1);
  for (int64_t k0 = range.lo / kPanel * kPanel; k0 < range.hi; k0 += kBlockK)
    key_tile(a, b, h, q0, rows, k0, panels, values, t);"""
