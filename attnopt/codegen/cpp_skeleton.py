"""The tiled online-softmax forward in C++, with holes written `@NAME@`."""

from __future__ import annotations

SKELETON = r"""
// Scores of R queries against a panel of keys: s[r][0 .. NV * kLanes).
template <int R, int NV> INLINE void score_block(const float* q, const float* panel, float* s) {
  VF sum[R][NV] = {};
  for (int d = 0; d < kD; ++d) {
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
    for (int v = 0; v < NV; ++v) store(s + r * kBlockK + v * kLanes, sum[r][v]);
}

// out[r][..] = out[r][..] * scale[r] + sum over keys of p[r][key] * v[key][..], for NV vectors of the width.
// Keys are summed in runs from zero: rounding then grows with the run's length, not with the whole row's.
template <int R, int NV>
INLINE void value_block(const float* p, const float* v, int64_t v_row, int keys, const float* scale, float* out) {
  for (int start = 0; start < keys; start += kRun) {
    const int stop = start + kRun < keys ? start + kRun : keys;
    VF sum[R][NV] = {};
    for (int key = start; key < stop; ++key, v += v_row) {
      VF value[NV];
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) value[i] = load(v + i * kLanes);
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
        store(o, load(o) * (start ? 1.0f : scale[r]) + sum[r][i]);
      }
  }
}

// The blocks above for any number of rows: a short last block is rounded up to one that exists.
template <int NV> void score_rows(int rows, const float* q, const float* panel, float* s) {
@SCORE_DISPATCH@
}
template <int NV>
void value_rows(int rows, const float* p, const float* v, int64_t v_row, int keys, const float* scale, float* out) {
@VALUE_DISPATCH@
}

struct KeyRange { int64_t lo, hi, full_lo, full_hi; };

// Keys that queries [q0, q1) can keep, and keys that all of them keep as far as coordinates decide.
INLINE KeyRange key_range(const Args& a, int64_t b, int64_t h, int64_t q0, int64_t q1) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@RANGE@
}

// Turns raw scores x[begin .. end) of one row into logits and returns their maximum.
template <bool kMasked>
float logits(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, float* x) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  const VF nothing = splat_f(-INFINITY);
  VF top = nothing;
@ROW@
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    VF s = load(x + j);
@ELEMENT@
    if constexpr (kRagged) logit = select(kIota < valid, logit, nothing);
    if constexpr (kRagged || kMasked || kChanges) store(x + j, logit);
    top = select(logit > top, logit, top);
  };
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{});
  return max_lanes(top);
}

// Weights of one row relative to the running maximum; `scale` is what earlier results have to be multiplied by.
void weigh(float* x, int begin, int end, float top, float& running_max, float& running_sum, float& scale) {
  const float next = top > running_max ? top : running_max;
  const float shift = next == -INFINITY ? 0.0f : next;
  VF sum{};
  for (int j = begin; j < end; j += kLanes) {
    const VF p = exp_negative(load(x + j) - shift);
    store(x + j, p);
    sum += p;
  }
  scale = next == running_max ? 1.0f : exp_negative(splat_f(running_max - shift))[0];
  running_sum = running_sum * scale + sum_lanes(sum);
  running_max = next;
}

// Scratch of one thread for one tile of queries.
struct Scratch {
  float q[kTileQ * kD], s[kTileQ * kBlockK], out[kTileQ * kWidth];
  float max[kTileQ], sum[kTileQ], scale[kTileQ], mean[kWidth];
};

// One tile of keys for all blocks of rows.
void key_tile(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int64_t k0, const float* panels,
              const float* values, int64_t v_row, Scratch& t) {
  const int blocks = (rows + kRows - 1) / kRows;
  int begin[kTileQ / kRows], end[kTileQ / kRows], last = 0;
  bool masked[kTileQ / kRows];
  for (int i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kRows;
    const KeyRange range = key_range(a, b, h, first, minimum(first + kRows, q0 + rows));
    begin[i] = int(maximum(range.lo - k0, int64_t(0))) / kPanel * kPanel;
    end[i] = int(maximum(minimum(range.hi - k0, int64_t(kBlockK)), int64_t(0)));
    if (end[i] <= begin[i]) begin[i] = end[i] = 0;
    masked[i] = k0 + begin[i] < range.full_lo || k0 + end[i] > range.full_hi;
    last = end[i] > last ? end[i] : last;
  }
  for (int column = 0; column < last; column += kPanel)
    for (int i = 0; i < blocks; ++i) {
      if (column < begin[i] || column >= end[i]) continue;
      const float *q = t.q + i * kRows * kD, *panel = panels + (k0 + column) * kD;
      float* s = t.s + i * kRows * kBlockK + column;
      const auto score = end[i] - column > kLanes ? score_rows<2> : score_rows<1>;
      score(rows - i * kRows, q, panel, s);
    }
  for (int r = 0; r < rows; ++r) {
    const int i = r / kRows;
    if (begin[i] == end[i]) continue;
    float* x = t.s + r * kBlockK;
    const auto form = masked[i] && kStaticMask ? logits<kStaticMask> : logits<false>;
    const float top = form(a, b, h, q0 + r, k0, begin[i], end[i], x);
    weigh(x, begin[i], end[i], top, t.max[r], t.sum[r], t.scale[r]);
  }
  for (int column = 0; column < kWidth; column += 2 * kLanes)
    for (int i = 0; i < blocks; ++i) {
      if (begin[i] == end[i]) continue;
      const float *p = t.s + i * kRows * kBlockK + begin[i], *v = values + (k0 + begin[i]) * v_row + column;
      const auto value = kWidth - column > kLanes ? value_rows<2> : value_rows<1>;
      value(rows - i * kRows, p, v, v_row, end[i] - begin[i], t.scale + i * kRows, t.out + i * kRows * kWidth + column);
    }
}

// Queries [q0, q0 + rows) of one head.
void query_tile(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, const float* panels, const float* values,
                int64_t v_row, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  const int padded = (rows + kRows - 1) / kRows * kRows;
  for (int r = 0; r < padded; ++r)
    for (int d = 0; d < kD; ++d) {
      const Element* q = a.q + b * a.q_stride[0] + h * a.q_stride[1] + (q0 + r) * a.q_stride[2];
      t.q[r * kD + d] = r < rows ? read_f(q[d * a.q_stride[3]]) * kScale : 0.0f;
    }
@SINK@
  for (int r = 0; r < padded; ++r) {
    t.max[r] = @FIRST_MAX@;
    t.sum[r] = @FIRST_SUM@;
    t.scale[r] = 1.0f;
  }
  memset(t.out, 0, sizeof(float) * padded * kWidth);
  memset(t.s, 0, sizeof(float) * padded * kBlockK);
  const KeyRange range = key_range(a, b, h, q0, q0 + rows);
  for (int64_t k0 = range.lo / kPanel * kPanel; k0 < range.hi; k0 += kBlockK)
    key_tile(a, b, h, q0, rows, k0, panels, values, v_row, t);
@EMPTY_PREPARE@
  for (int r = 0; r < rows; ++r) {
    const int64_t q = q0 + r;
    const bool empty = t.sum[r] == 0.0f;
@GATE@
    const float inverse = empty ? 0.0f : 1.0f / t.sum[r];
    Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
    for (int d = 0; d < kDv; ++d) {
      float value = t.out[r * kWidth + d] * inverse;
@EMPTY_ROW@
      write(out + d * a.out_stride[3], value@GATE_FACTOR@);
    }
@LSE@
  }
}
"""
