"""The products of the backward in C++, and the packing of what they read.

Matrices lie as column panels `[width / kPanel][rows][kPanel]`; the last may be one vector.
"""

from __future__ import annotations

PACK = r"""
// Products are summed in runs from zero: rounding then grows with a run's length, not with all of the sum's.
constexpr int kRun = 128;
constexpr int whole(int width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Rows of elements times factors (one a row, or one for all) as column panels of kHigh rows, zero beyond.
template <int W, int kHigh>
void take(const Element* from, int64_t row, int64_t column, int count, const float* factor, int step, float* to) {
  for (int c = 0; c < whole(W); c += kPanel) {
    const int width = whole(W) - c < kPanel ? whole(W) - c : kPanel, valid = W - c < width ? W - c : width;
    float* p = to + c * kHigh;
    for (int r = 0; r < count; ++r, p += width) {
      const Element* x = from + r * row + c * column;
      const float scale = factor[r * step];
      int d = 0;
      for (; column == 1 && d + kLanes <= valid; d += kLanes) store(p + d, load_f<false>(x + d, kLanes) * scale);
      for (; d < width; ++d) p[d] = d < valid ? read_f(x[d * column]) * scale : 0.0f;
    }
    memset(p, 0, sizeof(float) * width * (kHigh - count));
  }
}

// The transposed rows: [kBlockK / kPanel][W][kPanel], zero beyond the last row.
template <int W> void take_turned(const Element* from, int64_t row, int64_t column, int count, float* to) {
  for (int k = 0; k < (count + kPanel - 1) / kPanel * kPanel; k += kLanes) {
    float* panel = to + k / kPanel * kPanel * W + k % kPanel;
    const int valid = count - k < kLanes ? (count > k ? count - k : 0) : kLanes;
    int d = 0;
    for (; column == 1 && d + kLanes <= W; d += kLanes) {
      VF x[kLanes] = {};
      for (int i = 0; i < valid; ++i) x[i] = load_f<false>(from + (k + i) * row + d, kLanes);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel, x[i]);
    }
    for (; d < W; ++d)
      for (int i = 0; i < kLanes; ++i)
        panel[d * kPanel + i] = i < valid ? read_f(from[(k + i) * row + d * column]) : 0.0f;
  }
}
"""

_GIVE = r"""
// Column panels of kHigh rows back to contiguous rows of W.
template <int W, int kHigh, class T> void give(const float* from, int count, float factor, T* to) {
  for (int c = 0; c < whole(W); c += kPanel) {
    const int width = whole(W) - c < kPanel ? whole(W) - c : kPanel, valid = W - c < width ? W - c : width;
    const float* p = from + c * kHigh;
    for (int r = 0; r < count; ++r, p += width) {
      T* x = to + int64_t(r) * W + c;
      int d = 0;
      for (; d + kLanes <= valid; d += kLanes) write(x + d, load(p + d) * factor);
      for (; d < valid; ++d) write(x + d, p[d] * factor);
    }
  }
}
"""

FINE = r"""
// e^x for x <= 0; zero below the normal range. Relative error 1e-7 throughout: errors of weights do not cancel here, as
// they do where weights are divided by their sum.
INLINE VF exp_fine(VF x) {
  const VF shifted = x * kLog2e + kRound;
  const VF scale = (VF)(((VU)shifted << 23) + 0x3f800000);
  const VF f = (x * kLog2e - (shifted - kRound)) + x * kLog2eLow;
  const VF p = exp2_fraction(f) * scale;
  return x < -87.0f ? VF{} : p;
}
"""

_INNER = r"""
// The product of two rows of kDv.
INLINE float inner(const Element* x, int64_t x_stride, const Element* y, int64_t y_stride) {
  VF sum{};
  float rest = 0;
  int d = 0;
  for (; x_stride == 1 && y_stride == 1 && d + kLanes <= kDv; d += kLanes)
    sum += load_f<false>(x + d, kLanes) * load_f<false>(y + d, kLanes);
  for (; d < kDv; ++d) rest += read_f(x[d * x_stride]) * read_f(y[d * y_stride]);
  return sum_lanes(sum) + rest;
}

// What a table gets: a vector of neighbours, or one place where all lanes mean the same.
template <bool kRagged> INLINE void add_to(float* p, VF x, int valid) {
  if constexpr (kRagged) {
    for (int lane = 0; lane < valid; ++lane) p[lane] += x[lane];
  } else {
    store(p, load(p) + x);
  }
}
INLINE bool equal_lanes(VI x) { return !any_(x != x[0]); }
"""

PRODUCT = r"""
// `count` columns of x, which lie together, against as many rows of a panel.
template <int kStride> INLINE void steps(const float* x, const float* panel, int count, VF (&sum)[kRows][2]) {
#pragma GCC unroll 4
  for (int d = 0; d < count; ++d) {
    const VF y0 = load(panel + d * kPanel), y1 = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] += x[r * kStride + d] * y0;
      sum[r][1] += x[r * kStride + d] * y1;
    }
  }
}

// s[r][0 .. kPanel) = sum over d of x[r][d] * y[0 .. kPanel)[d] for kRows rows from `first` on.
template <int W> void product(const float* x, int first, const float* y, float* s) {
  constexpr int kFull = W / kPanel * kPanel, kTail = W - kFull, kTailWidth = whole(W) - kFull;
#pragma GCC unroll 1
  for (int start = 0; start < W; start += kRun) {
    VF sum[kRows][2] = {};
    for (int c = start; c < start + kRun && c < kFull; c += kPanel)
      steps<kPanel>(x + c * kBlockQ + first * kPanel, y + c * kPanel, kPanel, sum);
    if constexpr (kTail > 0)
      if (kFull >= start && kFull < start + kRun)
        steps<kTailWidth>(x + kFull * kBlockQ + first * kTailWidth, y + kFull * kPanel, kTail, sum);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 2; ++i) {
        float* p = s + r * kBlockK + i * kLanes;
        store(p, start ? load(p) + sum[r][i] : sum[r][i]);
      }
  }
}
"""

_ADD = r"""
// out[i][..] += sum over j < count of p[i * kRow + j * kColumn] * x[j][..] for kRows rows and NV vectors.
template <int NV, int kRow, int kColumn> INLINE void add(const float* p, const float* x, int count, float* out) {
  VF sum[kRows][NV] = {};
#pragma GCC unroll 4
  for (int j = 0; j < count; ++j) {
    VF y[NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) y[i] = load(x + (j * NV + i) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) sum[r][i] += p[r * kRow + j * kColumn] * y[i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < NV; ++i) {
      float* o = out + (r * NV + i) * kLanes;
      store(o, load(o) + sum[r][i]);
    }
}
// All columns: x has kFrom rows in a panel, of which `j` is the first; out kTo, of which `r` is the first.
template <int W, int kFrom, int kTo, int kRow, int kColumn>
void add_rows(const float* p, const float* x, int j, int count, float* out, int r) {
  int c = 0;
  for (; c + kPanel <= whole(W); c += kPanel)
    add<2, kRow, kColumn>(p, x + c * kFrom + j * kPanel, count, out + c * kTo + r * kPanel);
  if (c < whole(W)) add<1, kRow, kColumn>(p, x + c * kFrom + j * kLanes, count, out + c * kTo + r * kLanes);
}
"""

BLOCKS = PACK + _GIVE + FINE + _INNER + PRODUCT + _ADD
