"""The tiled forward in C++: the two products and the tile that joins them, with holes written `@NAME@`."""

from __future__ import annotations

SCORE_BLOCK = r"""
// Products are summed in runs from zero: rounding then grows with a run's length, not with all of the sum's.
constexpr int kRun = 128;

// Scores of R queries against a panel of keys: s[r][0 .. NV * kLanes).
template <int R, int NV> void score_block(const float* q, const float* panel, float* s) {
#pragma GCC unroll 1
  for (int start = 0; start < kD; start += kRun) {
    const int stop = start + kRun < kD ? start + kRun : kD;
    VF sum[R][NV] = {};
#pragma GCC unroll 4
    for (int d = start; d < stop; ++d) {
      VF key[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) key[v] = load(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[r][v] += q[r * kD + d] * key[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* p = s + r * kBlockK + v * kLanes;
        store(p, start ? load(p) + sum[r][v] : sum[r][v]);
      }
  }
}
"""

VALUE_BLOCK = r"""
// out[r][..] = out[r][..] * scale[r] + sum over keys of p[r][key] * v[key][0 .. NV * kLanes).
// At most kRun keys.
template <int R, int NV> void value_block(const float* p, const float* v, int keys, const float* scale, float* out) {
  VF sum[R][NV] = {};
#pragma GCC unroll 4
  for (int key = 0; key < keys; ++key) {
    VF value[NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) value[i] = load(v + (key * NV + i) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) sum[r][i] += p[r * kBlockK + key] * value[i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      float* o = out + r * kWidth + i * kLanes;
      store(o, load(o) * scale[r] + sum[r][i]);
    }
}

// The blocks for a number of rows, one vector or two: a short last block is rounded up to one that exists.
typedef void (*ScoreBlock)(const float*, const float*, float*);
typedef void (*ValueBlock)(const float*, const float*, int, const float*, float*);
@TILE_DISPATCH@
"""

ROW_IO = r"""
// A row of elements as floats times a factor, and back.
INLINE void read_row(const Element* p, int64_t stride, int count, float factor, float* to) {
  int d = 0;
  if (stride == 1)
#pragma GCC unroll 4
    for (; d + kLanes <= count; d += kLanes) store(to + d, load_f<false>(p + d, kLanes) * factor);
  for (; d < count; ++d) to[d] = read_f(p[d * stride]) * factor;
}
INLINE void write_row(const float* from, int count, float factor, Element* p, int64_t stride) {
  int d = 0;
  for (; stride == 1 && d + kLanes <= count; d += kLanes) write(p + d, load(from + d) * factor);
  for (; d < count; ++d) write(p + d * stride, from[d] * factor);
}
"""

COMMON = (
    ROW_IO
    + r"""
@KEY_LIST@
struct KeyRange { int64_t lo, hi, full_lo, full_hi; };

// Keys that queries [q0, q1) can keep, and keys that all of them keep as far as coordinates decide.
INLINE KeyRange key_range(const Args& a, int64_t b, int64_t h, int64_t q0, int64_t q1) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@RANGE@
}

// Scratch of one thread for one tile of queries. `top` and `sum` have one entry a lane: they meet when all is done.
struct alignas(64) Scratch {  // and the panels behind it begin with a cache line
  float q[kTileQ * kDepth], s[kTileQ * kBlockK], out[kTileQ * kWidth];
  float sum[kStats * kLanes], scale[kStats];
@SCRATCH@
@COPIES@
};

@ROWS@
"""
)

TILE = r"""
const float kOnes[kRows] = {@ONES@};

// One tile of keys for all blocks of rows.
void key_tile(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int64_t k0, const float* panels,
              const float* values,@FULL_GIVEN@ Scratch& t) {
  const int64_t n_k = a.n_k;
  const int blocks = (rows + kRows - 1) / kRows;
  int begin[kTileQ / kRows], end[kTileQ / kRows], last = 0;
  int left[kTileQ / kRows];
  bool masked[kTileQ / kRows];
  for (int i = 0; i < blocks; ++i) {
    left[i] = rows - i * kRows < kRows ? rows - i * kRows : kRows;
@BLOCK_RANGE@
    begin[i] = int(maximum(range.lo - k0, int64_t(0))) / kPanel * kPanel;
    end[i] = int(maximum(minimum(range.hi - k0, int64_t(kBlockK)), int64_t(0)));
    if (end[i] <= begin[i]) begin[i] = end[i] = 0;
    masked[i] = @MASKED_TILE@;
    last = end[i] > last ? end[i] : last;
  }
  for (int column = 0; column < last; column += kPanel)
    for (int i = 0; i < blocks; ++i) {
      if (column < begin[i] || column >= end[i]) continue;
      const float *q = t.q + i * kRows * kD, *panel = panels + (k0 + column) * kD;
      float* s = t.s + i * kRows * kBlockK + column;
      kScore[end[i] - column > kLanes][left[i]](q, panel, s);
    }
  for (int r = 0; r < rows; ++r) {
    const int i = r / kRows;
    const auto form = masked[i] && kStaticMask ? row_pass<kStaticMask> : row_pass<false>;
    form(a, b, h, @PLACE@, k0, begin[i], end[i], r, t);
  }
@RESCALE@
  for (int column = 0; column < kWidth; column += kPanel) {
    const int width = kWidth - column < kPanel ? kWidth - column : kPanel;
    for (int i = 0; i < blocks; ++i) {
      if (begin[i] == end[i]) continue;
      float* out = t.out + i * kRows * kWidth + column;
      const auto block = kValue[width > kLanes][left[i]];
      for (int start = begin[i]; start < end[i]; start += kRun) {
        const float *p = t.s + i * kRows * kBlockK + start, *v = values + column * n_k + (k0 + start) * width;
        const int keys = end[i] - start < kRun ? end[i] - start : kRun;
        block(p, v, keys, start == begin[i] ? t.scale + i * kRows : kOnes, out);
      }
    }
  }
}

// Queries [q0, q0 + rows) of one head.
void query_tile(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, const float* panels, const float* values,
                Scratch& t) {
  const int padded = (rows + kRows - 1) / kRows * kRows;
  const Element* first = a.q + b * a.q_stride[0] + h * a.q_stride[1]@FIRST_QUERY@;
  for (int r = 0; r < rows; ++r) read_row(first + @STEP@ * a.q_stride[2], a.q_stride[3], kD, kScale, t.q + r * kD);
  memset(t.q + rows * kD, 0, sizeof(float) * (padded - rows) * kD);
  memset(t.out, 0, sizeof(float) * padded * kWidth);
  for (int r = 0; r < kStats; ++r) start_row(a, b, h, r, t);
@VISIT_TILES@
  for (int r = 0; r < rows; ++r) finish_row(a, b, h, @PLACE@, r, t);
}
"""
