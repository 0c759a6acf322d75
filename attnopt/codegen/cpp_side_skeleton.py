"""Column mass and weights in C++, with holes written `@NAME@`: a tile of keys visits the tiles of queries, in order."""

from __future__ import annotations

SIDE = r"""
struct KeyRange { int64_t lo, hi, full_lo, full_hi; };

// Keys that queries [q0, q1) can keep, and keys that all of them keep as far as coordinates decide.
INLINE KeyRange key_range(const Args& a, int64_t b, int64_t h, int64_t q0, int64_t q1) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@RANGE@
}

// One thread's memory: a tile of keys, transposed, one of queries, their pairs, and sums over queries.
struct alignas(64) Worker {
  float keys[kBlockK * kD], q[kBlockQ * kDeep], p[kBlockQ * kBlockK];
  double mass[kBlockK];
};

// Turns a row of scores x[begin .. end) into weights; zeros up to `last`, where no key is kept.
template <bool kMasked>
void row_pass(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, int last, float* x) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@KNOWN@
@ROW@
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    const VF s = load(x + j);
@ELEMENT@
    store(x + j, p);
  };
  for (int j = 0; j < begin; j += kLanes) store(x + j, VF{});
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{}), j += kLanes;
  for (; j < last; j += kLanes) store(x + j, VF{});
}

// The weights of queries [q0, q0 + rows) and of a tile of keys.
void weigh(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int64_t k0, int keys, int last, Worker& t) {
  for (int first = 0; first < rows; first += kRows) {
    const int left = rows - first < kRows ? rows - first : kRows;
    const KeyRange range = key_range(a, b, h, q0 + first, q0 + first + left);
    int begin = int(minimum(maximum(range.lo - k0, int64_t(0)), int64_t(kBlockK))) / kPanel * kPanel;
    int end = int(maximum(minimum(range.hi - k0, int64_t(keys)), int64_t(0)));
    if (end <= begin) begin = end = 0;
    for (int c = begin; c < end; c += kPanel) product<kD>(t.q, first, t.keys + c * kD, t.p + first * kBlockK + c);
    const bool masked = k0 + begin < range.full_lo || k0 + end > range.full_hi;
    const auto form = masked && kStaticMask ? row_pass<kStaticMask> : row_pass<false>;
    for (int r = first; r < first + left; ++r) form(a, b, h, q0 + r, k0, begin, end, last, t.p + r * kBlockK);
  }
}

INLINE void write_weights(const float* p, int count, Element* to) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) write(to + j, load(p + j));
  for (; j < count; ++j) write(to + j, p[j]);
}

// One tile of keys of one head.
void item(const Args& a, int64_t b, int64_t h, int64_t k0, Worker& t) {
  const Element *keys = a.k + b * a.k_stride[0] + key_head(h) * a.k_stride[1] + k0 * a.k_stride[2];
  const Element *queries = a.q + b * a.q_stride[0] + h * a.q_stride[1];
  const int count = int(minimum(int64_t(kBlockK), a.n_k - k0)), last = (count + kPanel - 1) / kPanel * kPanel;
  take_turned<kD>(keys, a.k_stride[2], a.k_stride[3], count, t.keys);
  for (double& x : t.mass) x = 0;
  for (int64_t q0 = 0; q0 < a.n_q; q0 += kBlockQ) {
    const int rows = int(minimum(int64_t(kBlockQ), a.n_q - q0));
    const KeyRange range = key_range(a, b, h, q0, q0 + rows);
    if (a.mass && (range.hi <= k0 || range.lo >= k0 + count || range.lo >= range.hi)) continue;
    take<kD, kBlockQ>(queries + q0 * a.q_stride[2], a.q_stride[2], a.q_stride[3], rows, &kScale, 0, t.q);
    weigh(a, b, h, q0, rows, k0, count, last, t);
    if (a.weights) {
      Element* to = a.weights + ((b * kHeads + h) * a.n_q + q0) * a.n_k + k0;
      for (int r = 0; r < rows; ++r) write_weights(t.p + r * kBlockK, count, to + r * a.n_k);
      continue;
    }
    for (int j = 0; j < count; j += kLanes) {
      VF sum{};
      for (int r = 0; r < rows; ++r) sum += load(t.p + r * kBlockK + j);
      for (int i = 0; i < kLanes; ++i) t.mass[j + i] += double(sum[i]);
    }
  }
  for (int j = 0; a.mass && j < count; ++j) a.mass[(b * kHeads + h) * a.n_k + k0 + j] = float(t.mass[j]);
}

int32_t run(const Args& a, int threads) {
  const int64_t tiles = (a.n_k + kBlockK - 1) / kBlockK, items = a.n_b * kHeads * tiles;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(Worker) * threads)) return 1;
  Worker* const workers = static_cast<Worker*>(memory);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < items; ++i)
    item(a, i / tiles / kHeads, i / tiles % kHeads, i % tiles * kBlockK, workers[omp_get_thread_num()]);
  free(memory);
  return 0;
}
}  // namespace
"""
