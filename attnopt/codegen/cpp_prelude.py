"""The part of a C++ kernel that is the same for every spec: vectors, conversions and elementary functions."""

from __future__ import annotations

from attnopt.codegen.cpp_elements import elements, half_type

_PRELUDE = r"""
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

// ---- vectors ------------------------------------------------------------------------------------
constexpr int kLanes = @LANES@;
typedef float VF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU __attribute__((vector_size(4 * kLanes)));  // wraps around
typedef int64_t VL __attribute__((vector_size(8 * kLanes)));
#define INLINE inline __attribute__((always_inline))

struct bfloat { uint16_t bits; };
@HALF@
INLINE VF splat_f(float x) { return x - VF{}; }
INLINE VI splat_i(int64_t x) { return int32_t(x) + VI{}; }
INLINE VL splat_l(int64_t x) { return x + VL{}; }
INLINE VI splat_b(bool x) { return VI{} - int32_t(x); }
INLINE VF to_float(VI x) { return __builtin_convertvector(x, VF); }
INLINE VF to_float(VL x) { return __builtin_convertvector(x, VF); }
INLINE VL to_long(VI x) { return __builtin_convertvector(x, VL); }
INLINE VI to_int(VF x) { return __builtin_convertvector(x, VI); }
INLINE int64_t to_int(float x) { return int64_t(x); }
INLINE VI to_bool(VI x) { return x; }
INLINE VI to_bool(VL x) { return __builtin_convertvector(x, VI); }
INLINE bool to_bool(bool x) { return x; }
INLINE VI not_(VI x) { return ~x; }
INLINE bool not_(bool x) { return !x; }
INLINE VF select(VI c, VF x, VF y) { return c ? x : y; }
INLINE VI select(VI c, VI x, VI y) { return c ? x : y; }
INLINE VL select(VI c, VL x, VL y) { return to_long(c) ? x : y; }
template <class X, class Y> INLINE auto select(bool c, X x, Y y) { return c ? x : y; }
INLINE bool any_(bool c) { return c; }
INLINE bool any_(VI c) {
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= c[lane];
  return all != 0;
}
INLINE bool lane_(bool c, int) { return c; }
INLINE bool lane_(VI c, int lane) { return c[lane] != 0; }
const VI kIota = {@IOTA@};

@ELEMENTS@
// ---- arithmetic -----------------------------------------------------------------------------------
// NaN in either argument is the result.
INLINE VF maximum(VF x, VF y) { return (x > y) | (x != x) ? x : y; }
INLINE VF minimum(VF x, VF y) { return (x < y) | (x != x) ? x : y; }
INLINE VI maximum(VI x, VI y) { return x > y ? x : y; }
INLINE VI minimum(VI x, VI y) { return x < y ? x : y; }
INLINE VL maximum(VL x, VL y) { return x > y ? x : y; }
INLINE VL minimum(VL x, VL y) { return x < y ? x : y; }
INLINE float maximum(float x, float y) { return x > y || x != x ? x : y; }
INLINE float minimum(float x, float y) { return x < y || x != x ? x : y; }
INLINE int64_t maximum(int64_t x, int64_t y) { return x > y ? x : y; }
INLINE int64_t minimum(int64_t x, int64_t y) { return x < y ? x : y; }

// Rounded down; a divisor of zero gives zero rather than a trap.
INLINE int64_t floor_div(int64_t x, int64_t y) {
  if (y == 0) return 0;
  const int64_t quotient = x / y;
  return quotient - (x % y != 0 && (x < 0) != (y < 0));
}
INLINE int64_t floor_mod(int64_t x, int64_t y) { return x - floor_div(x, y) * y; }
template <class V> INLINE V map2(V x, V y, int64_t (*f)(int64_t, int64_t)) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = f(x[lane], y[lane]);
  return x;
}
INLINE VI floor_div(VI x, VI y) { return map2(x, y, floor_div); }
INLINE VI floor_mod(VI x, VI y) { return map2(x, y, floor_mod); }
INLINE VL floor_div(VL x, VL y) { return map2(x, y, floor_div); }
INLINE VL floor_mod(VL x, VL y) { return map2(x, y, floor_mod); }

template <class X> INLINE X square_(X x) { return x * x; }
INLINE VF abs_(VF x) { return (VF)((VI)x & 0x7fffffff); }
INLINE VI abs_(VI x) { return x < 0 ? -x : x; }
INLINE VL abs_(VL x) { return x < 0 ? -x : x; }
INLINE float abs_(float x) { return fabsf(x); }
INLINE int64_t abs_(int64_t x) { return x < 0 ? -x : x; }
INLINE VF sign_(VF x) { return x > 0.0f ? splat_f(1.0f) : x < 0.0f ? splat_f(-1.0f) : x; }
INLINE VI sign_(VI x) { return (x < 0) - (x > 0); }
INLINE float sign_(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }
INLINE int64_t sign_(int64_t x) { return (x > 0) - (x < 0); }

template <class F> INLINE VF map1(VF x, F f) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = f(x[lane]);
  return x;
}
INLINE VF floor_(VF x) { return map1(x, floorf); }
INLINE VF trunc_(VF x) { return map1(x, truncf); }
INLINE VF sqrt_(VF x) { return map1(x, sqrtf); }
INLINE VF log_(VF x) { return map1(x, logf); }
INLINE VF sin_(VF x) { return map1(x, sinf); }
INLINE VF cos_(VF x) { return map1(x, cosf); }
INLINE VF erf_(VF x) { return map1(x, erff); }
INLINE VF pow_(VF x, VF y) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = powf(x[lane], y[lane]);
  return x;
}
INLINE float floor_(float x) { return floorf(x); }
INLINE float trunc_(float x) { return truncf(x); }
INLINE float sqrt_(float x) { return sqrtf(x); }
INLINE float exp_(float x) { return expf(x); }
INLINE float log_(float x) { return logf(x); }
INLINE float tanh_(float x) { return tanhf(x); }
INLINE float sin_(float x) { return sinf(x); }
INLINE float cos_(float x) { return cosf(x); }
INLINE float erf_(float x) { return erff(x); }
INLINE float pow_(float x, float y) { return powf(x, y); }

// (2^f - 1) / f for |f| <= 1/2, relative error 5e-9 before rounding.
INLINE VF exp2_slope(VF f) {
  VF p = f * 0.00015353362f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  return p * f + 0.693147182f;
}
INLINE VF exp2_fraction(VF f) { return exp2_slope(f) * f + 1.0f; }
constexpr float kLog2e = 1.44269502f, kLog2eLow = 1.92596303e-8f;
constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits

// e^x for x <= 0; zero below the normal range. Relative error 1.7e-7 near zero, and 2e-8 |x| more further out,
// where the weight itself is small.
INLINE VF exp_negative(VF x) {
  const VF shifted = x * kLog2e + kRound;
  const VF scale = (VF)(((VU)shifted << 23) + 0x3f800000);
  const VF f = x * kLog2e - (shifted - kRound);
  VF p = f * 0.00132647273f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = (p * f + 1.0f) * scale;
  return x < -87.0f ? VF{} : p;
}

// e^x for any x.
INLINE VF exp_(VF x) {
  const VF in_range = x > 89.0f ? splat_f(89.0f) : x < -104.0f ? splat_f(-104.0f) : x;
  const VF shifted = in_range * kLog2e + kRound;
  const VF f = (in_range * kLog2e - (shifted - kRound)) + in_range * kLog2eLow;
  const VI n = (VI)shifted - 0x4b400000;
  const VI half = n >> 1;
  return exp2_fraction(f) * (VF)((VU)(half + 127) << 23) * (VF)((VU)(n - half + 127) << 23);
}

// From e^2x - 1, which keeps its digits near zero: relative error below 2.8e-7 for any x, and never above one.
INLINE VF tanh_(VF x) {
  x = x > 10.0f ? splat_f(10.0f) : x;
  x = x < -10.0f ? splat_f(-10.0f) : x;
  const VF shifted = x * (2 * kLog2e) + kRound;
  const VF scale = (VF)(((VU)shifted << 23) + 0x3f800000);
  const VF f = x * (2 * kLog2e) - (shifted - kRound);
  const VF growth = exp2_slope(f) * f * scale + (scale - 1.0f);
  return growth / (growth + 2.0f);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, VI{__VA_ARGS__})
#endif
// The sum of all lanes: of halves, then of halves of those.
INLINE float sum_lanes(VF x) {
@SUM@
  return x[0];
}
// The largest lane.
INLINE float max_lanes(VF x) {
@MOST@
  return x[0];
}
// The transposition of a square of kLanes vectors.
INLINE void transpose(VF* x) {
  for (int stage = 1; stage < kLanes; stage *= 2) {
    VF y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = SHUFFLE(x[i], x[i + kLanes / 2], @LOW@);
      y[2 * i + 1] = SHUFFLE(x[i], x[i + kLanes / 2], @HIGH@);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}
"""


def prelude(lanes: int, half: bool) -> str:
    """The text for vectors of `lanes` floats; `half` where any tensor is float16."""
    low = [n for i in range(lanes // 2) for n in (i, i + lanes)]
    high = [n + lanes // 2 for n in low]
    halves = [lanes >> i for i in range(1, lanes.bit_length())]
    across = [f"SHUFFLE(x, x, {', '.join(str(i ^ w) for i in range(lanes))})" for w in halves]
    parts = {
        "LANES": str(lanes),
        "IOTA": ", ".join(map(str, range(lanes))),
        "SUM": "\n".join(f"  x += {other};" for other in across),
        "MOST": "\n".join(f"  x = select(x > {other}, x, {other});" for other in across),
        "LOW": ", ".join(map(str, low)),
        "HIGH": ", ".join(map(str, high)),
        "HALF": half_type(half),
        "ELEMENTS": elements(half),
    }
    text = _PRELUDE
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text.strip() + "\n"
