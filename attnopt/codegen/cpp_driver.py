"""Packing of keys and values, and the two ways to share the work among threads, in C++."""

from __future__ import annotations

PACKING = r"""
// Keys as fp32 panels [n_k / kPanel][kD][kPanel], zero beyond the last key.
void pack_keys(const Args& a, int64_t b, int64_t head, float* panels) {
  const Element* keys = a.k + b * a.k_stride[0] + head * a.k_stride[1];
  const int64_t row = a.k_stride[2], column = a.k_stride[3];
  for (int64_t k0 = 0; k0 < a.n_k; k0 += kLanes) {
    float* panel = panels + k0 / kPanel * kPanel * kD + k0 % kPanel;
    const int valid = int(minimum(a.n_k - k0, int64_t(kLanes)));
    int d = 0;
@FEW_KEYS@
    for (; column == 1 && d + kLanes <= kD; d += kLanes) {
      VF x[kLanes] = {};
      for (int i = 0; i < valid; ++i) x[i] = load_f<false>(keys + (k0 + i) * row + d, kLanes);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
    for (; d < kD; ++d)
      for (int i = 0; i < kLanes; ++i)
        panel[d * kPanel + i] = i < valid ? read_f(keys[(k0 + i) * row + d * column]) : 0.0f;
  }
}

// Values as fp32 panels [kWidth / kPanel][n_k][kPanel], zero beyond kDv; the last panel may be one vector wide.
void pack_values(const Args& a, int64_t b, int64_t head, float* panels) {
  const Element* values = a.v + b * a.v_stride[0] + head * a.v_stride[1];
  for (int column = 0; column < kWidth; column += kPanel) {
    const int width = kWidth - column < kPanel ? kWidth - column : kPanel;
    const int valid = kDv - column < width ? kDv - column : width;
    for (int64_t k = 0; k < a.n_k; ++k, panels += width) {
      const Element* from = values + k * a.v_stride[2] + column;
      if (a.v_stride[3] == 1 && valid == kPanel) {
        for (int i = 0; i < kPanel; i += kLanes) store(panels + i, load_f<false>(from + i, kLanes));
        continue;
      }
      if (valid < width) memset(panels, 0, sizeof(float) * width);
      read_row(values + k * a.v_stride[2] + column * a.v_stride[3], a.v_stride[3], valid, 1.0f, panels);
    }
  }
}
"""

DRIVER = r"""
// Queries are cut into tiles of equal height, so that none is left over with a few rows.
struct Cut { int64_t count, height; };
INLINE Cut cut_queries(int64_t n_q) {
@CUT@
}

struct Buffers {
  Scratch* scratch;
  float *keys, *values;
  int64_t keys_size, values_size;  // floats of one head
};

void tile_of(const Args& a, int64_t b, int64_t h, int64_t tile, Cut cut, const float* panels, const float* values,
             Scratch& scratch) {
@TILE_ROWS@
  query_tile(a, b, h, q0, rows, panels, values, scratch);
}

// Many key heads: each thread packs one and serves all its queries from its own cache.
void by_key_head(const Args& a, const Buffers& buffers, int threads) {
  const Cut cut = cut_queries(a.n_q);
  const int64_t items = a.n_b * kKeyHeads;
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num();
    float *panels = buffers.keys + me * buffers.keys_size, *values = buffers.values + me * buffers.values_size;
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < items; ++item) {
      const int64_t b = item / kKeyHeads, head = item % kKeyHeads;
      pack_keys(a, b, head, panels);
      pack_values(a, b, head, values);
@NEXT@
      for (int64_t h = 0; h < kHeads; ++h) {
        if (key_head(h) != head) continue;
        for (int64_t tile = 0; tile < cut.count; ++tile)
          tile_of(a, b, h, tile, cut, panels, values, buffers.scratch[me]);
      }
    }
  }
}

// Few key heads: all are packed first, then the tiles of queries are shared out.
void by_query_tile(const Args& a, const Buffers& buffers, int threads) {
  const Cut cut = cut_queries(a.n_q);
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = buffers.scratch[omp_get_thread_num()];
@NO_NEXT@
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < a.n_b * (kKeyHeads + kValueHeads); ++item) {
      const int64_t b = item / (kKeyHeads + kValueHeads), head = item % (kKeyHeads + kValueHeads);
      if (head < kKeyHeads) {
        pack_keys(a, b, head, buffers.keys + (b * kKeyHeads + head) * buffers.keys_size);
      } else {
        const int64_t v_head = head - kKeyHeads;
        pack_values(a, b, v_head, buffers.values + (b * kValueHeads + v_head) * buffers.values_size);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < a.n_b * kHeads * cut.count; ++item) {
      // Late tiles first: under a causal mask they cost most.
      const int64_t tile = cut.count - 1 - item % cut.count, h = item / cut.count % kHeads;
      const int64_t b = item / cut.count / kHeads;
      const float* panels = buffers.keys + (b * kKeyHeads + key_head(h)) * buffers.keys_size;
      const float* values = buffers.values + (b * kValueHeads + value_head(h)) * buffers.values_size;
      tile_of(a, b, h, tile, cut, panels, values, scratch);
    }
  }
}

int32_t @RUN@(const Args& a, int threads) {
  const bool per_head = kSharedHeads && (threads == 1 || a.n_b * kKeyHeads >= 4 * threads);
  const int64_t panels = (a.n_k + kPanel - 1) / kPanel * kPanel;
  const int64_t keys_size = panels * kD, values_size = a.n_k * kWidth;
  const int64_t key_sets = per_head ? threads : a.n_b * kKeyHeads;
  const int64_t value_sets = per_head ? threads : a.n_b * kValueHeads;
  const int64_t floats = key_sets * keys_size + value_sets * values_size;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(Scratch) * threads + sizeof(float) * floats)) return 1;
  Buffers buffers;
  buffers.scratch = static_cast<Scratch*>(memory);
  buffers.keys = reinterpret_cast<float*>(buffers.scratch + threads);
  buffers.values = buffers.keys + key_sets * keys_size;
  buffers.keys_size = keys_size;
  buffers.values_size = values_size;
  per_head ? by_key_head(a, buffers, threads) : by_query_tile(a, buffers, threads);
  free(memory);
  return 0;
}
}  // namespace
"""
