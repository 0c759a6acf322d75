"""The forward in C++ for heads whose keys are one tile, with holes written `@NAME@`: windows, patches, short texts.

A few rows at a time go all the way from the scores to the result, so that only they are between the products, and
nothing is kept from one tile of keys for the next. Rows are shared out evenly: 49 are nine fives and a four.
"""

from __future__ import annotations

WHOLE_BLOCKS = r"""
// So few keys in the last panel stay rows, and their scores are sums over lanes: a panel would be nearly all zeros.
constexpr int kFew = kD % kLanes == 0 ? 2 : 0;

// Scores of R queries against `count` rows of keys: s[r][0 .. kLanes), zero beyond the last key.
template <int R> INLINE void few_scores(const float* q, const float* keys, int count, float* s) {
  VF found[R] = {};
  for (int key = 0; key < count; ++key) {
    VF sum[R] = {};
#pragma GCC unroll 4
    for (int d = 0; d < kD; d += kLanes) {
      const VF x = load(keys + key * kD + d);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] += load(q + r * kD + d) * x;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) found[r] = select(kIota == key, splat_f(sum_lanes(sum[r])), found[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(s + r * kBlockK, found[r]);
}

// The sums of R rows over all keys, times factors:
// out[r][..] = factor[r] * sum of p[r][key] * v[key][0 .. NV * kLanes).
template <int R, int NV>
INLINE void value_rows(const float* p, const float* v, int keys, const float* factor, float* out, int64_t stride) {
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
    for (int i = 0; i < NV; ++i) store(out + r * stride + i * kLanes, sum[r][i] * factor[r]);
}
"""

WHOLE = r"""
static_assert(kBlockK <= kRun, "the values of all keys are one run");

// Where rows of floats without gaps can be written at once; null for other elements.
INLINE float* in_place(float* out) { return out; }
template <class T> INLINE float* in_place(T*) { return nullptr; }

// Asks for a part of what is computed next, query i's share, so that memory and products work side by side: small heads
// are over before the hardware has seen where they lead. A few lines at a time: what exceeds the misses that a core can
// have under way holds up everything behind it.
template <class T> INLINE void fetch(const T* base, const int64_t* stride, int first, int last, int width) {
  if (stride[3] != 1) return;
  for (int64_t row = first; row < last; ++row)
    for (int d = 0; d < width; d += 64 / int(sizeof(T))) __builtin_prefetch(base + row * stride[2] + d);
}
INLINE void fetch_part(const Args& a, const Scratch& t, int64_t query) {
  if (t.next == 0) return;
  const int64_t b = t.next / kKeyHeads, head = t.next % kKeyHeads;
  const int i = int(query), n_k = int(a.n_k), n_q = int(a.n_q);
  const int first = n_k * i / n_q, last = n_k * (i + 1) / n_q;
  fetch(a.k + b * a.k_stride[0] + head * a.k_stride[1], a.k_stride, first, last, kD);
  fetch(a.v + b * a.v_stride[0] + head * a.v_stride[1], a.v_stride, first, last, kDv);
  if (kHeads != kKeyHeads) return;
  fetch(a.q + b * a.q_stride[0] + head * a.q_stride[1], a.q_stride, i, i + 1, kD);
  fetch(a.out + b * a.out_stride[0] + head * a.out_stride[1], a.out_stride, i, i + 1, kDv);
}

@SETTLE@

// Queries [q0, q0 + R) of one head from their scores to their results.
template <int R>
void row_block(const Args& a, int64_t b, int64_t h, int64_t q0, const float* panels, const float* values, Scratch& t) {
  const int64_t n_k = a.n_k;
  const Element* first = a.q + b * a.q_stride[0] + h * a.q_stride[1] + q0 * a.q_stride[2];
  for (int r = 0; r < R; ++r) read_row(first + r * a.q_stride[2], a.q_stride[3], kD, kScale, t.q + r * kD);
  for (int r = 0; r < R; ++r) start_row(a, b, h, r, t);
  const KeyRange range = key_range(a, b, h, q0, q0 + R);
  const int last = int(minimum(range.hi, n_k)), begin = int(maximum(range.lo, int64_t(0))) / kPanel * kPanel;
  const int end = last > begin ? last : begin;
  for (int column = begin; column < end; column += kPanel) {
    if (end - column > kLanes) score_block<R, 2>(t.q, panels + column * kD, t.s + column);
    else if (n_k - column <= kFew) few_scores<R>(t.q, panels + column * kD, end - column, t.s + column);
    else score_block<R, 1>(t.q, panels + column * kD, t.s + column);
  }
  const bool masked = begin < range.full_lo || end > range.full_hi;
  const auto form = masked && kStaticMask ? row_pass<kStaticMask> : row_pass<false>;
  for (int r = 0; r < R; ++r) form(a, b, h, q0 + r, 0, begin, end, r, t);
@RESCALE_BLOCK@
  bool lost = false;
  for (int r = 0; r < R; ++r) {
    t.factor[r] = row_factor(a, b, h, q0 + r, r, t);
    lost |= !(abs_(t.factor[r]) < INFINITY);
  }
  Element* const out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q0 * a.out_stride[2];
  float* const place = kDv == kWidth && a.out_stride[3] == 1 ? in_place(out) : nullptr;
  float* to = place ? place : t.out;
  const int64_t stride = place ? a.out_stride[2] : kWidth;
  const float* p = t.s + begin;
  int column = 0;
  for (; column + kPanel <= kWidth; column += kPanel)
    value_rows<R, 2>(p, values + column * n_k + begin * kPanel, end - begin, t.factor, to + column, stride);
  if (column < kWidth)
    value_rows<R, 1>(p, values + column * n_k + begin * kLanes, end - begin, t.factor, to + column, stride);
  for (int r = 0; r < R && !place; ++r)
    write_row(t.out + r * kWidth, kDv, 1.0f, out + r * a.out_stride[2], a.out_stride[3]);
  for (int r = 0; r < R && lost; ++r) fill_empty(a, b, h, q0 + r, r, t);
}

typedef void (*RowBlock)(const Args&, int64_t, int64_t, int64_t, const float*, const float*, Scratch&);
@WHOLE_DISPATCH@

// Queries [q0, q0 + rows) of one head, in blocks of equal height.
void query_tile(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, const float* panels, const float* values,
                Scratch& t) {
  const int blocks = (rows + kRows - 1) / kRows;
  for (int i = 0; i < blocks; ++i) {
    const int begin = rows * i / blocks, end = rows * (i + 1) / blocks;
    kRowBlock[end - begin](a, b, h, q0 + begin, panels, values, t);
  }
}
"""

# What a thread remembers of the rows at hand and of the head that it takes next, and where the driver says so.
NEXT = {
    "COPIES": "  float factor[kStats];\n  int64_t next;  // head of keys to ask for meanwhile; 0 for none",
    "FEW_KEYS": """\
    if (k0 % kPanel == 0 && valid <= kFew) {
      for (int i = 0; i < valid; ++i) read_row(keys + (k0 + i) * row, column, kD, 1.0f, panel + i * kD);
      continue;
    }""",
    "NEXT": "      buffers.scratch[me].next = a.n_q <= kMostQ && item + 1 < items ? item + 1 : 0;",
    "NO_NEXT": "    scratch.next = 0;",
}
