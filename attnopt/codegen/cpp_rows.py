"""What is done to a row of scores between the two products, in C++, with holes written `@NAME@`."""

from __future__ import annotations

SOFTMAX = r"""
// Turns raw scores x[begin .. end) of row r into logits and keeps their maximum.
template <bool kMasked>
void row_pass(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  float* const x = t.s + r * kBlockK;
  const VF nothing = splat_f(-INFINITY);
  VF top = nothing;
@ROW@
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    VF s = load(x + j);
@ELEMENT@
    if constexpr (kRagged) logit = select(kIota < valid, logit, nothing);
    if constexpr (kRagged || kMasked || kChanges) store(x + j, logit);
@WEIGHT_STORE@
    top = select(logit > top, logit, top);
  };
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{});
  store(t.top + r * kLanes, top);
}

// The new maxima of kLanes rows, and what their earlier results have to be multiplied by.
INLINE void raise(int r, Scratch& t) {
  VF x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = load(t.top + (r + i) * kLanes);
  transpose(x);
  const VF old = load(t.max + r);
  VF next = old;
  for (int i = 0; i < kLanes; ++i) next = select(x[i] > next, x[i], next);
  const VF shift = select(to_bool(next == -INFINITY), VF{}, next);
  store(t.max + r, next);
  store(t.shift + r, shift);
  store(t.scale + r, select(to_bool(next == old), splat_f(1.0f), exp_negative(old - shift)));@GROW@
}

// Weights of one row relative to the running maximum.
INLINE void weigh(int begin, int end, int r, Scratch& t) {
  float* const x = t.s + r * kBlockK;
  const float shift = t.shift[r];
  VF sum = load(t.sum + r * kLanes) * t.scale[r];@SPENT_START@
  for (int j = begin; j < end; j += kLanes) {
    const VF p = exp_negative(load(x + j) - shift);@SPENT_ADD@
    store(x + j, p@WEIGHT_LOAD@);
    sum += p;
  }
  store(t.sum + r * kLanes, sum);@SPENT_STORE@
}
"""

POINTWISE = r"""
// Turns raw scores x[begin .. end) of row r into weights and adds them up.
template <bool kMasked>
void row_pass(const Args& a, int64_t b, int64_t h, int64_t q, int64_t k0, int begin, int end, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  float* const x = t.s + r * kBlockK;
  const VF nothing{};
  VF sum = load(t.sum + r * kLanes)@SIZE_START@;
@ROW@
  const auto element = [&](int j, int valid, auto ragged) __attribute__((always_inline)) {
    constexpr bool kRagged = decltype(ragged)::value;
    VF s = load(x + j);
@ELEMENT@
    if constexpr (kRagged) logit = select(kIota < valid, logit, nothing);
    sum += logit;
@SIZE_ADD@
    store(x + j, logit@WEIGHT_FACTOR@);
  };
  int j = begin;
  for (; j + kLanes <= end; j += kLanes) element(j, kLanes, Whole{});
  if (j < end) element(j, end - j, Ragged{});
  store(t.sum + r * kLanes, sum);
@SIZE_STORE@
}
"""

STARTS = r"""
// The mean of all values of a query head's value head.
void average(const Args& a, int64_t b, int64_t h, float* mean) {
  const Element* values = a.v + b * a.v_stride[0] + value_head(h) * a.v_stride[1];
  for (int d = 0; d < kDv; ++d) {
    double total = 0;
    for (int64_t k = 0; k < a.n_k; ++k) total += read_f(values[k * a.v_stride[2] + d * a.v_stride[3]]);
    mean[d] = float(total / double(a.n_k));
  }
}

// A row before any key.
INLINE void start_row(const Args& a, int64_t b, int64_t h, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  store(t.sum + r * kLanes, VF{});
  t.scale[r] = 1.0f;
@START@
}
"""

ENDS = (
    STARTS
    + r"""
// The result of a row after all keys.
void finish_row(const Args& a, int64_t b, int64_t h, int64_t q, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@FINISH@
@GATE@
@LSE@
  Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
@EMPTY@
  write_row(t.out + r * kWidth, kDv, inverse@GATE_FACTOR@, out, a.out_stride[3]);
}
"""
)

# The same where the products are multiplied by a row's factor as they are written.
ROW_ENDS = (
    STARTS
    + r"""
// What the sums of a row have to be multiplied by; no finite number where it may be empty.
INLINE float row_factor(const Args& a, int64_t b, int64_t h, int64_t q, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@FINISH@
@GATE@
@LSE@
  return inverse@GATE_FACTOR@;
}

// The result of a row that has no key.
void fill_empty(const Args& a, int64_t b, int64_t h, int64_t q, int r, Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
@FINISH@
@GATE@
  Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
@EMPTY@
}
"""
)
