"""The work of the backward in C++: one head's tiles, the sharing among threads, and how their results meet."""

from __future__ import annotations

DRIVER = r"""
// Queries are cut into tiles of equal height, so that none is left over with a few rows.
struct Cut { int64_t count, height; };
INLINE Cut cut_queries(int64_t n_q) {
  const int64_t count = (n_q + kBlockQ - 1) / kBlockQ, height = (n_q + count - 1) / count;
  return {count, (height + kRows - 1) / kRows * kRows};
}

// One row: what its weights' gradients are measured from, and what its result was multiplied by.
void know_row(const Args& a, int64_t b, int64_t h, int64_t q, bool first, Worker& t) {
  const int64_t n_b = a.n_b, n_h = kHeads, n_q = a.n_q, n_k = a.n_k, row = (b * kHeads + h) * n_q + q;
  const Element* grad = a.grad + b * a.grad_stride[0] + h * a.grad_stride[1] + q * a.grad_stride[2];
@GATE@
  const float factor = 1.0f@GATE_FACTOR@;
  t.factor[q] = factor;
@KNOWN@
}

// The queries and result gradients of one head, and zeros for the gradients of its queries.
void take_head(const Args& a, int64_t b, int64_t h, Cut cut, bool first, Worker& t) {
  const Element* q = a.q + b * a.q_stride[0] + h * a.q_stride[1];
  const Element* grad = a.grad + b * a.grad_stride[0] + h * a.grad_stride[1];
  for (int64_t i = 0; i < a.n_q; ++i) know_row(a, b, h, i, first, t);
  for (int64_t i = 0; i < cut.count; ++i) {
    const int64_t q0 = i * cut.height;
    const int rows = int(minimum(cut.height, a.n_q - q0));
    if (rows <= 0) continue;
    take<kD, kBlockQ>(q + q0 * a.q_stride[2], a.q_stride[2], a.q_stride[3], rows, &kScale, 0,
                      t.q + i * kBlockQ * kDeep);
    take<kDv, kBlockQ>(grad + q0 * a.grad_stride[2], a.grad_stride[2], a.grad_stride[3], rows, t.factor + q0, 1,
                       t.g + i * kBlockQ * kWidth);
  }
  memset(t.dq, 0, sizeof(float) * cut.count * kBlockQ * kDeep);
}

struct Work {
  int64_t tiles, splits, items, step;
  Cut cut;
  float* parts;  // gradients of queries by split, where there are several
};

// Every `splits`-th tile of keys of one key head and batch entry, for all query heads of the group.
void item(const Args& a, const Work& w, int64_t head, int64_t split, int64_t b, Worker& t) {
  static const float one = 1.0f;
  const Element* keys = a.k + b * a.k_stride[0] + head * a.k_stride[1];
  const Element* values = a.v + b * a.v_stride[0] + head * a.v_stride[1];
  memset(t.dk, 0, sizeof(float) * w.tiles * kBlockK * kDeep);
  memset(t.dv, 0, sizeof(float) * w.tiles * kBlockK * kWidth);
  memset(t.uniform, 0, sizeof t.uniform);
  for (int64_t h = 0; h < kHeads; ++h) {
    if (key_head(h) != head) continue;
    take_head(a, b, h, w.cut, split == 0, t);
    for (int64_t tile = split; tile < w.tiles; tile += w.splits) {
      const int64_t k0 = tile * kBlockK;
      const int count = int(minimum(int64_t(kBlockK), a.n_k - k0));
      const Element *k = keys + k0 * a.k_stride[2], *v = values + k0 * a.v_stride[2];
      take_turned<kD>(k, a.k_stride[2], a.k_stride[3], count, t.keys);
      take_turned<kDv>(v, a.v_stride[2], a.v_stride[3], count, t.values);
      take<kD, kBlockK>(k, a.k_stride[2], a.k_stride[3], count, &one, 0, t.rows);
      float *dk = t.dk + tile * kBlockK * kDeep, *dv = t.dv + tile * kBlockK * kWidth;
      for (int64_t i = 0; i < w.cut.count; ++i) {
        const int64_t q0 = i * w.cut.height;
        const int rows = int(minimum(w.cut.height, a.n_q - q0));
        if (rows > 0) pair(a, b, h, q0, rows, k0, count, i, dk, dv, t);
      }
    }
    for (int64_t i = 0; i < w.cut.count; ++i) {
      const int64_t q0 = i * w.cut.height, rows = minimum(w.cut.height, a.n_q - q0);
      const int64_t place = ((b * kHeads + h) * a.n_q + q0) * kD;
      if (rows <= 0) continue;
      const float* dq = t.dq + i * kBlockQ * kDeep;
      if (w.splits == 1) give<kD, kBlockQ>(dq, int(rows), kScale, a.dq + place);
      else give<kD, kBlockQ>(dq, int(rows), kScale, w.parts + split * a.n_b * kHeads * a.n_q * kD + place);
    }
  }
  for (int64_t tile = split; tile < w.tiles; tile += w.splits) {
    const int64_t k0 = tile * kBlockK, row = (b * kKeyHeads + head) * a.n_k + k0;
    const int count = int(minimum(int64_t(kBlockK), a.n_k - k0));
    float *dk = t.dk + tile * kBlockK * kDeep, *dv = t.dv + tile * kBlockK * kWidth;
@SPREAD@
    give<kD, kBlockK>(dk, count, 1.0f, a.dk + row * kD);
    give<kDv, kBlockK>(dv, count, 1.0f, a.dv + row * kDv);
  }
}

// Key heads, or parts of them where they are few. A slot has whole batches of one where possible.
Work divide(const Args& a, int threads) {
  Work w{};
  w.tiles = (a.n_k + kBlockK - 1) / kBlockK;
  w.cut = cut_queries(a.n_q);
  const int64_t heads = a.n_b * kKeyHeads;
  w.splits = threads == 1 || heads >= 2 * threads ? 1 : minimum((2 * threads + heads - 1) / heads, w.tiles);
  w.items = heads * w.splits;
  w.step = kKeyHeads * w.splits >= threads ? a.n_b : 1;
  return w;
}

void place(Worker& t, float* memory, const Args& a, const Work& w) {
  const int64_t rows = w.cut.count * kBlockQ, keys = w.tiles * kBlockK;
  t.q = memory, memory += rows * kDeep;
  t.g = memory, memory += rows * kWidth;
  t.dq = memory, memory += rows * kDeep;
  t.dk = memory, memory += keys * kDeep;
  t.dv = memory, memory += keys * kWidth;
  t.lse = memory, memory += rows;
  t.delta = memory, memory += rows;
  t.factor = memory, memory += rows;
  t.sink = memory;
}

int32_t run(const Args& a, int threads) {
  Work w = divide(a, threads);
  const int64_t each = w.cut.count * kBlockQ * (2 * kDeep + kWidth + 4) + w.tiles * kBlockK * (kDeep + kWidth);
  const int64_t floats = (each + 15) / 16 * 16, queries = a.n_b * kHeads * a.n_q * kD;
  const int64_t parts = w.splits > 1 ? (w.splits * queries + 15) / 16 * 16 : 0;
@COPIES@
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(Worker) * threads + sizeof(float) * (floats * threads + parts + copies)))
    return 1;
  Worker* const workers = static_cast<Worker*>(memory);
  float* const free_floats = reinterpret_cast<float*>(workers + threads);
  w.parts = free_floats + floats * threads;
  float* const copied = w.parts + parts;
  memset(copied, 0, sizeof(float) * copies);
  const int64_t blocks = w.items / w.step;
#pragma omp parallel num_threads(threads)
  {
    // What a slot does depends on its number alone, so the sums of its tables do too.
    for (int64_t slot = omp_get_thread_num(); slot < threads; slot += omp_get_num_threads()) {
      Worker& t = workers[slot];
      place(t, free_floats + floats * slot, a, w);
@SLOT@
      for (int64_t i = slot * blocks / threads * w.step; i < (slot + 1) * blocks / threads * w.step; ++i)
        item(a, w, i / a.n_b / w.splits, i / a.n_b % w.splits, i % a.n_b, t);
    }
#pragma omp barrier
    if (w.splits > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < queries; ++i) {
        float sum = w.parts[i];
        for (int64_t split = 1; split < w.splits; ++split) sum += w.parts[split * queries + i];
        write(a.dq + i, sum);
      }
    }
  }
@JOIN@
  free(memory);
  return 0;
}
}  // namespace
"""
