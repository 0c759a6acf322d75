"""One pair of tiles of the backward in C++, with holes written `@NAME@`.

A tile of keys visits the tiles of queries that may keep any of them: five products for each pair. The gradients of keys
and values are summed beside the tile, those of queries in a buffer of the head, so nothing is computed twice and no two
threads add to one place.
"""

from __future__ import annotations

TILE = r"""
struct KeyRange { int64_t lo, hi, full_lo, full_hi; };

// Keys that queries [q0, q1) can keep, and keys that all of them keep as far as coordinates decide.
INLINE KeyRange key_range(const Args& a, int64_t b, int64_t h, int64_t q0, int64_t q1) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@RANGE@
}

// One thread's memory: a tile of keys and values, a pair of tiles, and what is known of a head.
struct Worker {
  float keys[kBlockK * kD], values[kBlockK * kDv];  // transposed
  float rows[kBlockK * kDeep];
  float p[kBlockQ * kBlockK], ds[kBlockQ * kBlockK];
  float uniform[kWidth];  // what rows without any key give to every value
  float *q, *g, *dq, *dk, *dv, *lse, *delta, *factor, *sink;
@TABLES@
};

// A weight is e^(logit - shift) * inverse; its gradient is measured from delta.
struct Row { float shift, delta, inverse; };
@SETTLE@
// Turns a row of scores and of their weights' gradients into weights and gradients of scores. Where `alone`, the row
// has no other keys.
template <bool kMasked>
void row_pass(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, int last, int r,
              bool alone, Worker& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  float *const x = t.p + r * kBlockK, *const y = t.ds + r * kBlockK;
@ROW@
  Row row{t.lse[q], t.delta[q], 1.0f};
@ALONE@
@ROW_TABLES@
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    const VF s = load(x + j), dp = load(y + j);
@ELEMENT@
  };
  for (int j = 0; j < begin; j += kLanes) store(x + j, VF{}), store(y + j, VF{});
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{}), j += kLanes;
  for (; j < last; j += kLanes) store(x + j, VF{}), store(y + j, VF{});
@ROW_END@
}

// One tile of queries against one of keys.
void pair(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int64_t k0, int keys, int64_t place, float* dk,
          float* dv, Worker& t) {
  const float *q = t.q + place * kBlockQ * kDeep, *g = t.g + place * kBlockQ * kWidth;
  float* dq = t.dq + place * kBlockQ * kDeep;
  const int blocks = (rows + kRows - 1) / kRows, last = (keys + kPanel - 1) / kPanel * kPanel;
  int begin[kBlockQ / kRows], end[kBlockQ / kRows];
  bool masked[kBlockQ / kRows], alone[kBlockQ / kRows], full = true, empty = true;
  for (int i = 0; i < blocks; ++i) {
    const int64_t first = q0 + i * kRows;
    const KeyRange range = key_range(a, b, h, first, minimum(first + kRows, q0 + rows));
    begin[i] = int(minimum(maximum(range.lo - k0, int64_t(0)), int64_t(kBlockK))) / kPanel * kPanel;
    end[i] = int(maximum(minimum(range.hi - k0, int64_t(keys)), int64_t(0)));
    if (end[i] <= begin[i]) begin[i] = end[i] = 0;
    masked[i] = k0 + begin[i] < range.full_lo || k0 + end[i] > range.full_hi;
    alone[i] = range.lo >= k0 && range.hi <= k0 + keys;
    full &= begin[i] == 0 && end[i] == keys;
    empty &= begin[i] == end[i];
  }
  if (empty) return;
  for (int c = 0; c < last; c += kPanel)
    for (int i = 0; i < blocks; ++i)
      if (c >= begin[i] && c < end[i]) product<kD>(q, i * kRows, t.keys + c * kD, t.p + i * kRows * kBlockK + c);
  for (int c = 0; c < last; c += kPanel)
    for (int i = 0; i < blocks; ++i)
      if (c >= begin[i] && c < end[i]) product<kDv>(g, i * kRows, t.values + c * kDv, t.ds + i * kRows * kBlockK + c);
  for (int r = 0; r < rows; ++r) {
    const int i = r / kRows;
    const auto form = masked[i] && kStaticMask ? row_pass<kStaticMask> : row_pass<false>;
    form(a, b, h, q0 + r, k0, begin[i], end[i], last, r, alone[i], t);
  }
  for (int c = 0; c < keys; c += kRows) {
    int lo = 0, hi = rows;
    if (!full) {
      const auto seen = [&](int i) { return begin[i] < c + kRows && end[i] > c; };
      int i = 0, n = blocks;
      while (i < n && !seen(i)) ++i;
      while (i < n && !seen(n - 1)) --n;
      lo = i * kRows, hi = n * kRows < rows ? n * kRows : rows;
      if (i >= n) continue;
    }
    add_rows<kDv, kBlockQ, kBlockK, 1, kBlockK>(t.p + lo * kBlockK + c, g, lo, hi - lo, dv, c);
    add_rows<kD, kBlockQ, kBlockK, 1, kBlockK>(t.ds + lo * kBlockK + c, q, lo, hi - lo, dk, c);
  }
  for (int i = 0; i < blocks; ++i)
    if (end[i] > begin[i])
      add_rows<kD, kBlockK, kBlockQ, kBlockK, 1>(t.ds + i * kRows * kBlockK + begin[i], t.rows, begin[i],
                                                 end[i] - begin[i], dq, i * kRows);
}
"""
