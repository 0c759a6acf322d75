"""What a thread of the linear attention in C++ keeps: a chunk of keys and values, and the state of those before it."""

from __future__ import annotations

STATE = r"""
// One thread's memory: a chunk of queries, keys (transposed) and values, and what earlier keys left.
struct Scratch {
  float q[kPadded * kDepth], k[kStateRows * kChunk], v[kChunk * kWidth], s[kPadded * kChunk], out[kPadded * kWidth];
  float state[kStateRows * kWidth], made[kStateRows * kWidth], keys[kStateRows];
  float total[kPadded], power[3 * kChunk];
  double exact[kStateRows * kWidth], key_sum[kStateRows];
  // With kLine the line at the chunk's keys, and the least so far, which the state is relative to.
  float line[kChunk];
  double floor;
  // With kTimed the same sums, each key times how far it is behind.
  float aged[kTimed ? kStateRows * kWidth : 1], late[kTimed ? kStateRows * kWidth : 1];
  float beside[kTimed ? kRows * kWidth : 1];
  double exact_aged[kTimed ? kStateRows * kWidth : 1], key_ages[kTimed ? kStateRows : 1];
};

// Keys [k0, k0 + count) and their values; zeros beyond.
void read_keys(const Args& a, int64_t b, int64_t h, int64_t k0, int count, Scratch& t) {
  const Element* keys = a.k + b * a.k_stride[0] + key_head(h) * a.k_stride[1];
  const Element* values = a.v + b * a.v_stride[0] + value_head(h) * a.v_stride[1];
  const float* factor = a.by_key ? a.by_key + b * a.by_key_stride[0] + h * a.by_key_stride[1] : nullptr;
  alignas(64) float rows[kLanes * kDepth] = {};
  for (int j = 0; j < kChunk; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (j + i >= count) {
        memset(rows + i * kDepth, 0, sizeof(float) * kDepth);
        continue;
      }
      const int64_t k = k0 + j + i;
      const float by_key = factor ? factor[k * a.by_key_stride[2]] : 1.0f;
      read_row(keys + k * a.k_stride[2], a.k_stride[3], kD, by_key, rows + i * kDepth);
    }
    for (int d = 0; d < kDepth; d += kLanes) {
      VF x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(rows + i * kDepth + d);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(t.k + (d + i) * kChunk + j, x[i]);
    }
  }
  if (kLine) {
    const float* line = a.line_k + b * a.line_k_stride[0] + h * a.line_k_stride[1];
    for (int j = 0; j < kChunk; ++j) t.line[j] = j < count ? line[(k0 + j) * a.line_k_stride[2]] : 0.0f;
  }
  for (int j = 0; j < kChunk; ++j) {
    if (j < count) read_row(values + (k0 + j) * a.v_stride[2], a.v_stride[3], kDv, 1.0f, t.v + j * kWidth);
    else memset(t.v + j * kWidth, 0, sizeof(float) * kWidth);
  }
}

// Each key of the chunk times a number.
INLINE void scale_keys(const float* factor, Scratch& t) {
  for (int d = 0; d < kDepth; ++d)
    for (int j = 0; j < kChunk; j += kLanes) store(t.k + d * kChunk + j, load(t.k + d * kChunk + j) * load(factor + j));
}
INLINE float sum_of_keys(int d, const Scratch& t) {
  VF sum{};
  for (int j = 0; j < kChunk; j += kLanes) sum += load(t.k + d * kChunk + j);
  return sum_lanes(sum);
}
INLINE void times_values(int count, float* made, const Scratch& t) {
  for (int d = 0; d < kDepth; d += kRows)
    product<false>(t.k + d * kChunk, kChunk, t.v, kWidth, count, made + d * kWidth, kWidth, kWidth);
}

// How much of the state is left after the chunk's keys; they fade to there.
double fade_keys(double rate, int count, Scratch& t) {
  alignas(64) float fade[kChunk];
  double old = exp(rate * count);
  if (kLine) {
    double floor = t.floor;
    for (int j = 0; j < count; ++j) floor = t.line[j] < floor ? t.line[j] : floor;
    old = exp(floor - t.floor);
    t.floor = floor;
  }
  for (int j = 0; j < kChunk; ++j)
    fade[j] = j >= count ? 0.0f : float(exp(kLine ? t.floor - t.line[j] : rate * (count - 1 - j)));
  scale_keys(fade, t);
  return old;
}

// The state takes in the chunk that was read. What it held fades, and so do the keys of the chunk.
void take_in(double rate, int count, Scratch& t) {
  const double old = kDecay || kLine ? fade_keys(rate, count, t) : 1.0;
  times_values(count, t.made, t);
  if (kTimed) {
    alignas(64) float sums[kStateRows], age[kChunk];
    for (int d = 0; d < kDepth; ++d) sums[d] = sum_of_keys(d, t);
    for (int j = 0; j < kChunk; ++j) age[j] = j < count ? count - 1 - j : 0.0f;
    scale_keys(age, t);
    times_values(count, t.late, t);
    for (int i = 0; i < kDepth * kWidth; ++i) {
      t.exact_aged[i] = (t.exact_aged[i] + count * t.exact[i]) * old + t.late[i];
      t.aged[i] = float(t.exact_aged[i]);
    }
    for (int d = 0; d < kDepth; ++d) {
      t.key_ages[d] = (t.key_ages[d] + count * t.key_sum[d]) * old + sum_of_keys(d, t);
      t.key_sum[d] = t.key_sum[d] * old + sums[d];
    }
  }
  for (int i = 0; i < kDepth * kWidth; ++i) {
    t.exact[i] = t.exact[i] * old + t.made[i];
    t.state[i] = float(t.exact[i]);
  }
  for (int d = 0; d < kDepth; ++d) {
    if (!kTimed) t.key_sum[d] = t.key_sum[d] * old + sum_of_keys(d, t);
    t.keys[d] = float(t.key_sum[d]);
  }
}
"""
