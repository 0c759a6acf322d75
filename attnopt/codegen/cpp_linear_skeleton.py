"""The chunked linear attention in C++, with holes written `@NAME@`: see `cpp_linear`."""

from __future__ import annotations

from attnopt.codegen.cpp_linear_state import STATE

_PRODUCTS = r"""
struct Args {
  int64_t n_b, n_q, n_k, offset, ahead;
  const Element *q, *k, *v;
  Element* out;
  const float *by_key, *by_query, *gate, *line_q, *line_k;
  const double* rate;
  float* total;
  int64_t q_stride[4], k_stride[4], v_stride[4], out_stride[4];
  int64_t by_key_stride[3], by_query_stride[3], gate_stride[3], rate_stride[2];
  int64_t line_q_stride[3], line_k_stride[3];
};

// out[r][..] (+)= sum over depth of a[r][i] * b[i][0 .. NV * kLanes).
template <int R, int NV, bool kAdd>
INLINE void block(const float* a, int lda, const float* b, int ldb, int depth, float* out, int ldo) {
  VF sum[R][NV] = {};
#pragma GCC unroll 2
  for (int i = 0; i < depth; ++i) {
    VF x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] += a[r * lda + i] * x[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* p = out + r * ldo + v * kLanes;
      store(p, kAdd ? load(p) + sum[r][v] : sum[r][v]);
    }
}
// One block of kRows rows over all columns.
template <bool kAdd>
void product(const float* a, int lda, const float* b, int ldb, int depth, float* out, int ldo, int width) {
  int column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes)
    block<kRows, 2, kAdd>(a, lda, b + column, ldb, depth, out + column, ldo);
  for (; column < width; column += kLanes) block<kRows, 1, kAdd>(a, lda, b + column, ldb, depth, out + column, ldo);
}
"""

_QUERIES = r"""
// The queries of a chunk as fp32 rows.
void read_queries(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int padded, Scratch& t) {
  const Element* queries = a.q + b * a.q_stride[0] + h * a.q_stride[1] + q0 * a.q_stride[2];
  const float* f = a.by_query ? a.by_query + b * a.by_query_stride[0] + h * a.by_query_stride[1] : nullptr;
  for (int r = 0; r < rows; ++r) {
    const float factor = f ? f[(q0 + r) * a.by_query_stride[2]] : 1.0f;
    read_row(queries + r * a.q_stride[2], a.q_stride[3], kD, factor, t.q + r * kDepth);
  }
  memset(t.q + rows * kDepth, 0, sizeof(float) * (padded - rows) * kDepth);
}

// The products of row r with the keys before place r + shift of the chunk, in place; returns their sum.
INLINE float own_keys(int r, int shift, int columns, float line, Scratch& t) {
  VF sum{};
  for (int j = 0; j < columns; j += kLanes) {
    const auto seen = kIota + j < splat_i(r + shift);
    VF x = select(seen, load(t.s + r * kChunk + j), VF{});
    if (kDecay) x *= load(t.power + kChunk - r - shift + j);
    if (kLine) x *= exp_(select(seen, line - load(t.line + j), VF{}));
    store(t.s + r * kChunk + j, x);
    sum += x;
  }
  return sum_lanes(sum);
}

// Row r of the state's part with each key times its distance: `gap` to where the state is from, and its age there.
INLINE void add_ages(int r, int own, float gap, Scratch& t) {
  double sum = 0.0;
  for (int d = 0; d < kDepth; ++d) sum += t.q[r * kDepth + d] * t.key_ages[d];
  t.total[r] = t.total[r] * gap + float(sum);
  for (int d = 0; d < kWidth; d += kLanes) {
    float* p = t.out + r * kWidth + d;
    store(p, load(p) * gap + load(t.beside + own * kWidth + d));
  }
}

// Queries [q0, q0 + rows): the state's part, and that of `count` keys from `base` on that were read.
void answer(const Args& a, int64_t b, int64_t h, int64_t q0, int rows, int64_t base, int count, double rate,
            Scratch& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k;
  const int shift = int(maximum(q0 + a.offset + 1 - base, -int64_t(kChunk)));
  const int padded = (rows + kRows - 1) / kRows * kRows;
  const float* line = kLine ? a.line_q + b * a.line_q_stride[0] + h * a.line_q_stride[1] : nullptr;
  read_queries(a, b, h, q0, rows, padded, t);
  for (int r0 = 0; r0 < padded; r0 += kRows) {
    float *q = t.q + r0 * kDepth, *s = t.s + r0 * kChunk, *out = t.out + r0 * kWidth;
    product<false>(q, kDepth, t.state, kWidth, kDepth, out, kWidth, kWidth);
    if (kTimed) product<false>(q, kDepth, t.aged, kWidth, kDepth, t.beside, kWidth, kWidth);
    // Of the chunk's keys the last row of this block sees this many.
    const int reached = r0 + kRows - 1 + shift, seen = count < reached ? count : reached;
    const int columns = seen > 0 ? (seen + kLanes - 1) / kLanes * kLanes : 0;
    if (seen > 0) product<false>(q, kDepth, t.k, kChunk, kDepth, s, kChunk, columns);
    for (int r = r0; r < r0 + kRows; ++r) {
      VF sum{};
      for (int d = 0; d < kDepth; d += kLanes) sum += load(t.q + r * kDepth + d) * load(t.keys + d);
      t.total[r] = sum_lanes(sum);
      const float at = line && r < rows ? line[(q0 + r) * a.line_q_stride[2]] : 0.0f;
      if (kDecay || kLine) {
        const int64_t gap = q0 + r + a.ahead - (base - 1);
        if (kTimed) add_ages(r, r - r0, float(gap), t);
        const double power = kLine ? (at - t.floor < 88.0 ? at - t.floor : 88.0) : rate * double(gap);
        const float grow = base > 0 && r < rows ? float(exp(power)) : 0.0f;
        t.total[r] *= grow;
        for (int d = 0; d < kWidth; d += kLanes) store(t.out + r * kWidth + d, load(t.out + r * kWidth + d) * grow);
      }
      t.total[r] += own_keys(r, shift, columns, at, t);
    }
    if (seen > 0) product<true>(s, kChunk, t.v, kWidth, seen, out, kWidth, kWidth);
  }
  for (int r = 0; r < rows; ++r) {
    const int64_t q = q0 + r;
    const float total = t.total[r];
@DIVIDE@
    float factor = 1.0f / divisor;
    if (a.gate) factor *= a.gate[b * a.gate_stride[0] + h * a.gate_stride[1] + q * a.gate_stride[2]];
    if (a.total) a.total[(b * kHeads + h) * n_q + q] = total;
    Element* out = a.out + b * a.out_stride[0] + h * a.out_stride[1] + q * a.out_stride[2];
    write_row(t.out + r * kWidth, kDv, factor, out, a.out_stride[3]);
  }
}

// The state takes in the keys before place `end`.
int64_t reach(const Args& a, int64_t b, int64_t h, int64_t base, int64_t end, double rate, Scratch& t) {
  while (base < end) {
    const int count = int(minimum(end - base, int64_t(kChunk)));
    read_keys(a, b, h, base, count, t);
    take_in(rate, count, t);
    base += count;
  }
  return base;
}

INLINE int64_t within(int64_t place, int64_t end) { return maximum(minimum(place, end), int64_t(0)); }

void head(const Args& a, int64_t b, int64_t h, Scratch& t) {
  memset(&t, 0, sizeof t);
  const double rate = a.rate ? a.rate[b * a.rate_stride[0] + h * a.rate_stride[1]] : 0.0;
  t.floor = __builtin_inf();
  for (int i = 0; kDecay && i < kChunk; ++i) {
    const double gap = double(i - a.offset + a.ahead);
    t.power[kChunk - 1 - i] = float(exp(rate * gap) * (kTimed ? gap : 1.0));
  }
  int64_t base = reach(a, b, h, 0, kCausal ? within(a.offset, a.n_k) : a.n_k, rate, t);
  for (int64_t q0 = 0; q0 < a.n_q; q0 += kChunk) {
    const int rows = int(minimum(a.n_q - q0, int64_t(kChunk)));
    // Every query of the chunk sees what is in the state; of the keys that follow the first one sees its own, each next
    // one more. The own key is no part of the state: its product is rounded once, in the weight and in their sum.
    const int whole = kCausal ? int(within(a.n_k - base, kChunk)) : 0;
    if (whole > 0) read_keys(a, b, h, base, whole, t);
    answer(a, b, h, q0, rows, base, whole, rate, t);
    if (!kCausal) continue;
    const int64_t next = within(q0 + kChunk + a.offset, a.n_k);
    if (next == base + whole && whole > 0) take_in(rate, whole, t), base = next;
    base = reach(a, b, h, base, next, rate, t);
  }
}

int32_t run(const Args& a, int threads) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(Scratch) * threads)) return 1;
  Scratch* const scratch = static_cast<Scratch*>(memory);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < a.n_b * kHeads; ++item)
    head(a, item / kHeads, item % kHeads, scratch[omp_get_thread_num()]);
  free(memory);
  return 0;
}
}  // namespace

extern "C" int32_t attnopt_abi() { return @ABI@; }

extern "C" const char* attnopt_key() { return "@KEY@"; }

extern "C" int32_t attnopt_forward(const void* const* tensors, void* out, float* total, const int64_t* meta,
                                   int32_t threads) {
  if (!tensors || !meta || threads < 1) return 2;
  Args a{};
  a.n_b = *meta++, a.n_q = *meta++, a.n_k = *meta++, a.offset = *meta++, a.ahead = *meta++;
  if (a.n_b < 0 || a.n_q < 0 || a.n_k < 0) return 2;
  int64_t* const strides[4] = {a.q_stride, a.k_stride, a.v_stride, a.out_stride};
  for (int i = 0; i < 16; ++i) strides[i / 4][i % 4] = *meta++;
  int64_t* const factors[3] = {a.by_key_stride, a.by_query_stride, a.gate_stride};
  for (int i = 0; i < 9; ++i) factors[i / 3][i % 3] = *meta++;
  for (int i = 0; i < 2; ++i) a.rate_stride[i] = *meta++;
  for (int i = 0; i < 3; ++i) a.line_q_stride[i] = *meta++;
  for (int i = 0; i < 3; ++i) a.line_k_stride[i] = *meta++;
  a.q = static_cast<const Element*>(tensors[0]);
  a.k = static_cast<const Element*>(tensors[1]);
  a.v = static_cast<const Element*>(tensors[2]);
  a.by_key = static_cast<const float*>(tensors[3]);
  a.by_query = static_cast<const float*>(tensors[4]);
  a.gate = static_cast<const float*>(tensors[5]);
  a.rate = static_cast<const double*>(tensors[6]);
  a.line_q = static_cast<const float*>(tensors[7]);
  a.line_k = static_cast<const float*>(tensors[8]);
  a.out = static_cast<Element*>(out);
  a.total = total;
  if (a.n_b == 0 || a.n_q == 0) return 0;
  if (!a.out || !a.q || (a.n_k > 0 && (!a.k || !a.v)) || (kLine && (!a.line_q || !a.line_k))) return 2;
  return run(a, threads);
}
"""

LINEAR = "\n".join(x.strip("\n") + "\n" for x in (_PRODUCTS, STATE, _QUERIES))
