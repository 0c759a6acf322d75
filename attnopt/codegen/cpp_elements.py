"""Elements of every dtype as floats and back, in C++."""

from __future__ import annotations

_ELEMENTS = r"""// ---- elements of any dtype ------------------------------------------------------------------------
template <class T> INLINE float read_f(T x) { return float(x); }
template <> INLINE float read_f(bfloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> INLINE int64_t read_i(T x) { return int64_t(x); }
INLINE void write(float* p, float x) { *p = x; }
INLINE void write(bfloat* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = x != x ? 0x7fc0 : uint16_t(rounded);
}
@WRITE_HALF@
INLINE VF load(const float* p) {
  VF x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, VF x) { memcpy(p, &x, sizeof x); }
INLINE void write(float* p, VF x) { store(p, x); }
template <class T> INLINE void write(T* p, VF x) {
  for (int lane = 0; lane < kLanes; ++lane) write(p + lane, x[lane]);
}

// kLanes consecutive elements; a ragged load reads the first `valid` ones only.
template <bool kRagged, class T> INLINE VF load_f(const T* p, int valid) {
  VF x{};
  if constexpr (kRagged) {
    for (int lane = 0; lane < valid; ++lane) x[lane] = read_f(p[lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = read_f(p[lane]);
  }
  return x;
}
template <bool kRagged> INLINE VF load_f(const bfloat* p, int valid) {
  typedef uint16_t Bits __attribute__((vector_size(2 * kLanes)));
  Bits bits{};
  if constexpr (kRagged) {
    for (int lane = 0; lane < valid; ++lane) bits[lane] = p[lane].bits;
  } else {
    memcpy(&bits, p, sizeof bits);
  }
#ifdef __AVX2__
  if constexpr (kLanes == 8) {  // one instruction; the conversion of vectors takes four
    typedef short Eight __attribute__((vector_size(16)));
    Eight narrow;
    memcpy(&narrow, &bits, sizeof narrow);
    const auto wide = __builtin_ia32_pmovzxwd256(narrow);
    VI x;
    memcpy(&x, &wide, sizeof x);
    return (VF)(x << 16);
  }
#endif
  return (VF)(__builtin_convertvector(bits, VI) << 16);
}
@LOAD_HALF@
template <bool kRagged> INLINE VF load_f(const float* p, int valid) {
  if constexpr (!kRagged) return load(p);
#ifdef __AVX__
  if constexpr (kLanes == 8) {  // what is masked is not read
    typedef float Eight __attribute__((vector_size(32)));
    typedef int Mask __attribute__((vector_size(32)));
    const VI inside = kIota < valid;
    const auto read = __builtin_ia32_maskloadps256(reinterpret_cast<const Eight*>(p), (Mask)inside);
    VF x;
    memcpy(&x, &read, sizeof x);
    return x;
  }
#endif
  VF x{};
  for (int lane = 0; lane < valid; ++lane) x[lane] = p[lane];
  return x;
}
template <bool kRagged, class T> INLINE VI load_i(const T* p, int valid) {
  VI x{};
  for (int lane = 0; lane < (kRagged ? valid : kLanes); ++lane) x[lane] = int32_t(p[lane]);
  return x;
}
template <bool kRagged> INLINE VL load_l(const int64_t* p, int valid) {
  VL x{};
  for (int lane = 0; lane < (kRagged ? valid : kLanes); ++lane) x[lane] = p[lane];
  return x;
}
"""

_HALF = "typedef _Float16 half;"
# The compiler converts vectors of halves one by one, whatever the processor has.
_LOAD_HALF = """\
#ifdef __F16C__
template <bool kRagged> INLINE VF load_f(const half* p, int valid) {
  typedef short Eight __attribute__((vector_size(16)));
  Eight bits[kLanes < 8 ? 1 : kLanes / 8] = {};
  memcpy(bits, p, 2 * (kRagged ? valid : kLanes));
  VF x;
  for (int i = 0; i < kLanes / 8; ++i) {
    const auto wide = __builtin_ia32_vcvtph2ps256(bits[i]);
    memcpy(reinterpret_cast<char*>(&x) + 32 * i, &wide, 32);
  }
  if constexpr (kLanes == 4) {
    const auto wide = __builtin_ia32_vcvtph2ps(bits[0]);
    memcpy(&x, &wide, sizeof x);
  }
  return x;
}
#endif"""
_WRITE_HALF = "INLINE void write(half* p, float x) { *p = half(x); }"


def elements(half: bool) -> str:
    """The conversions; `half` where any tensor is float16."""
    parts = {"LOAD_HALF": _LOAD_HALF, "WRITE_HALF": _WRITE_HALF}
    text = _ELEMENTS
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value if half else "")
    return text.rstrip()


def half_type(half: bool) -> str:
    """The definition of `half`, where it is used."""
    return _HALF if half else ""
