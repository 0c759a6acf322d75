"""The streaming forward in C++, for few queries: keys and values are read once, from where they are, for a whole group.

The rows of a tile are the queries of all heads that share a key head. With few key heads the keys are split among the
threads, and the parts are merged in the order of the keys.
"""

from __future__ import annotations

STREAM_BLOCKS = r"""
// Sums of kLanes vectors, one a lane.
INLINE VF fold(VF* x) {
@FOLD@
  return x[0];
}

// Where keys or values of one head are read: in place, or copied into whole vectors first.
struct Rows {
  const Element* base;
  int64_t row;
  INLINE const Element* at(int64_t k) const { return base + k * row; }
};

// Elements of a cache line, and how many of them are read before the next lines are asked for.
constexpr int kLine = 64 / int(sizeof(Element)), kAhead = kDepth % kLine == 0 && kLine > kLanes ? kLine : kLanes;
constexpr int kKeyLines = (kDepth + kLine - 1) / kLine, kValueLines = (kWidth + kLine - 1) / kLine;

// Asks for a line of some rows, counted through all of them: whatever the order of products, memory is read in its own.
template <int kLines> INLINE void fetch_line(Rows rows, unsigned line) {
  __builtin_prefetch(rows.at(line / kLines) + line % kLines * kLine);
}

// Scores of R queries: s[r][0 .. keys), R * (keys at a time) = kLanes. Beyond `valid` the last key is repeated.
// Meanwhile the rows `next` are fetched.
template <int R> void score_block(const float* q, Rows keys, Rows next, int count, int valid, float* s) {
  constexpr int kAtOnce = kLanes / R;
  for (int key = 0; key < count; key += kAtOnce) {
    const Element* rows[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) rows[i] = keys.at(key + i < valid ? key + i : valid - 1);
    VF sum[kLanes] = {};
    for (int start = 0; start < kDepth; start += kAhead) {
#pragma GCC unroll 16
      for (int i = 0; i < kAtOnce; ++i) fetch_line<kValueLines>(next, key * kValueLines + start / kLine * kAtOnce + i);
#pragma GCC unroll 16
      for (int d = start; d < start + kAhead; d += kLanes) {
        VF x[kAtOnce];
#pragma GCC unroll 16
        for (int i = 0; i < kAtOnce; ++i) x[i] = load_f<false>(rows[i] + d, kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const VF query = load(q + r * kDepth + d);
#pragma GCC unroll 16
          for (int i = 0; i < kAtOnce; ++i) sum[r * kAtOnce + i] += query * x[i];
        }
      }
    }
    const VF folded = fold(sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      memcpy(s + r * kBlockK + key, reinterpret_cast<const float*>(&folded) + r * kAtOnce, 4 * kAtOnce);
  }
}

// out[r][..] = out[r][..] * scale[r] + sum over keys of p[r][key] * v[key][..], NV vectors of the width at a time.
template <int R, int NV>
INLINE void value_columns(const float* p, Rows values, Rows next, int keys, const float* scale, float* out,
                          int column) {
  constexpr int kLines = NV * kLanes > kLine ? NV * kLanes / kLine : 1;
  VF sum[R][NV] = {};
#pragma GCC unroll 2
  for (int key = 0; key < keys; ++key) {
    const Element* v = values.at(key) + column;
    for (int i = 0; i < kLines && column % kLine == 0; ++i)
      fetch_line<kKeyLines>(next, (column / kLine + i) * kBlockK + key);
    VF x[NV];
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) x[i] = load_f<false>(v + i * kLanes, kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sum[r][i] += p[r * kBlockK + key] * x[i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) {
      float* o = out + r * kWidth + column + i * kLanes;
      store(o, load(o) * scale[r] + sum[r][i]);
    }
}
template <int R>
void value_block(const float* p, Rows values, Rows next, int keys, const float* scale, float* out) {
  constexpr int kAtOnce = kLanes / R * kLanes;
  int column = 0;
  for (; column + kAtOnce <= kWidth; column += kAtOnce)
    value_columns<R, kLanes / R>(p, values, next, keys, scale, out, column);
  for (; column < kWidth; column += kLanes) value_columns<R, 1>(p, values, next, keys, scale, out, column);
}

typedef void (*ScoreBlock)(const float*, Rows, Rows, int, int, float*);
typedef void (*ValueBlock)(const float*, Rows, Rows, int, const float*, float*);
@STREAM_DISPATCH@
"""

STREAM = r"""
// The rows of a tile, `count` of them from `first` on, as (query head, query) of one key head.
struct Tile {
  int64_t b, head, first;
  int count;
  int64_t h[kTileQ], q[kTileQ];
};

void find_rows(const Args& a, Tile& tile) {
  int64_t place = 0;
  int found = 0;
  for (int64_t h = 0; h < kHeads; ++h) {
    if (key_head(h) != tile.head) continue;
    for (int64_t q = 0; q < @HEAD_ROWS@ && found < tile.count; ++q, ++place)
      if (place >= tile.first) tile.h[found] = h, tile.q[found] = @HEAD_ROW@, ++found;
  }
}

// The range of keys of some rows together: what any of them can keep, and what all of them keep.
INLINE KeyRange joint_range(const Args& a, const Tile& tile, int begin, int end) {
  KeyRange all = key_range(a, tile.b, tile.h[begin], tile.q[begin], tile.q[begin] + 1);
  for (int r = begin + 1; r < end; ++r) {
    const KeyRange one = key_range(a, tile.b, tile.h[r], tile.q[r], tile.q[r] + 1);
    if (one.lo >= one.hi) {
      all.full_hi = all.full_lo;
      continue;
    }
    const bool none = all.lo >= all.hi;
    all.lo = none ? one.lo : minimum(all.lo, one.lo), all.hi = none ? one.hi : maximum(all.hi, one.hi);
    all.full_lo = maximum(all.full_lo, one.full_lo);
    all.full_hi = none ? all.full_lo : minimum(all.full_hi, one.full_hi);
  }
  return all;
}

// Rows that are no whole vectors, or whose elements lie apart, are copied; `first` is the place of the first key.
INLINE Rows rows_of(const Element* base, const int64_t* stride, int64_t first, int count, int width, Element* copy) {
  const int whole = (width + kLanes - 1) / kLanes * kLanes;
  base += first * stride[2];
  if (stride[3] == 1 && width == whole) return {base, stride[2]};
  for (int k = 0; k < count; ++k)
    for (int d = 0; d < whole; ++d) copy[k * whole + d] = d < width ? base[k * stride[2] + d * stride[3]] : Element{};
  return {copy, whole};
}

// One block of keys for all rows of a tile. The values are fetched while scores are made, and the next keys after.
void key_block(const Args& a, const Tile& tile, const KeyRange* ranges, int64_t k0, int valid,@FULL_GIVEN@
               Scratch& t) {
  const int64_t b = tile.b, v_head = value_head(tile.h[0]);
  const Element* k_base = a.k + b * a.k_stride[0] + tile.head * a.k_stride[1];
  const Element* v_base = a.v + b * a.v_stride[0] + v_head * a.v_stride[1];
  const Rows keys = rows_of(k_base, a.k_stride, k0, valid, kD, t.keys);
  const Rows values = rows_of(v_base, a.v_stride, k0, valid, kDv, t.values);
  const Rows next{keys.at(kBlockK), keys.row};
  const int rows = tile.count, whole = (valid + kLanes - 1) / kLanes * kLanes;
  int begin[kTileQ] = {}, end[kTileQ] = {};
  for (int r = 0; r < rows; r += kRows) {
    const KeyRange range = ranges[r / kRows];
    const int lo = int(maximum(range.lo - k0, int64_t(0))) / kLanes * kLanes;
    const int hi = int(maximum(minimum(range.hi - k0, int64_t(valid)), int64_t(0)));
    if (hi <= lo) continue;
    const int left = rows - r < kRows ? rows - r : kRows;
    kScore[left](t.q + r * kDepth, keys, values, whole, valid, t.s + r * kBlockK);
    const bool masked = @MASKED_BLOCK@;
    const auto form = masked && kStaticMask ? row_pass<kStaticMask> : row_pass<false>;
    for (int i = r; i < r + left; ++i) {
      begin[i] = lo, end[i] = hi;
      form(a, b, tile.h[i], tile.q[i], k0, lo, hi, i, t);
    }
  }
  for (int r = 0; r < rows; ++r)
    if (begin[r] == end[r]) row_pass<false>(a, b, tile.h[r], tile.q[r], k0, 0, 0, r, t);
@RESCALE@
  for (int r = 0; r < rows; r += kRows) {
    if (begin[r] == end[r]) continue;
    const int left = rows - r < kRows ? rows - r : kRows;
    const Rows kept{values.at(begin[r]), values.row};
    kValue[left](t.s + r * kBlockK + begin[r], kept, next, end[r] - begin[r], t.scale + r, t.out + r * kWidth);
  }
}

// What one part of the keys found for one row.
struct Part { float max, sum, size, out[kWidth]; };

INLINE void start_part(int r, Scratch& t) {
@START_PART@
}
void keep_part(const Scratch& t, int r, Part& part) {
@KEEP_PART@
  memcpy(part.out, t.out + r * kWidth, sizeof part.out);
}

// Adds the part of some keys to what earlier keys found.
void join_part(const Part& part, int r, Scratch& t) {
@JOIN_PART@
}

// Keys [lo, hi) for all rows of a tile. What a row starts with is counted once: where its parts meet.
void visit(const Args& a, const Tile& tile, int64_t lo, int64_t hi, bool alone, Scratch& t) {
  for (int r = 0; r < tile.count; ++r) {
    const Element* q = a.q + tile.b * a.q_stride[0] + tile.h[r] * a.q_stride[1] + tile.q[r] * a.q_stride[2];
    read_row(q, a.q_stride[3], kD, kScale, t.q + r * kDepth);
    for (int d = kD; d < kDepth; ++d) t.q[r * kDepth + d] = 0.0f;
  }
  int padded = 1;  // the rows of the block that holds them
  while (padded < tile.count) padded *= 2;
  padded = padded < kTileQ ? padded : kTileQ;
  memset(t.q + tile.count * kDepth, 0, sizeof(float) * (padded - tile.count) * kDepth);
  memset(t.out, 0, sizeof(float) * padded * kWidth);
  const int whole = (tile.count + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < whole; ++r) start_row(a, tile.b, tile.h[r < tile.count ? r : 0], r, t);
  for (int r = 0; !alone && r < whole; ++r) start_part(r, t);
  KeyRange ranges[kTileQ], all{INT64_MAX, 0, 0, 0};
  for (int r = 0; r < tile.count; r += kRows) {
    const KeyRange range = joint_range(a, tile, r, r + kRows < tile.count ? r + kRows : tile.count);
    ranges[r / kRows] = range;
    if (range.lo < range.hi) all.lo = minimum(all.lo, range.lo), all.hi = maximum(all.hi, range.hi);
  }
@VISIT_BLOCKS@
}
"""

STREAM_DRIVER = r"""
struct Work { int64_t group, tiles, splits, items, span; };

// Tiles of rows times splits of keys: enough of them for all threads, and no split below 512 keys.
Work divide(const Args& a, int threads) {
  Work w{};
  for (int64_t head = 0; head < kKeyHeads; ++head) {
    int64_t group = 0;
    for (int64_t h = 0; h < kHeads; ++h) group += key_head(h) == head;
    w.group = maximum(w.group, group * a.n_q);
  }
  w.tiles = (w.group + kTileQ - 1) / kTileQ;
  const int64_t pieces = a.n_b * kKeyHeads * w.tiles;
  const int64_t wanted = threads == 1 || pieces >= 4 * threads ? 1 : (4 * threads + pieces - 1) / pieces;
  const int64_t n_k = @VISITED@;
  w.splits = maximum(minimum(wanted, n_k / 512), int64_t(1));
  w.span = ((n_k + w.splits - 1) / w.splits + @SPAN@ - 1) / @SPAN@ * @SPAN@;
  w.items = pieces * w.splits;
  return w;
}

INLINE Tile tile_at(const Args& a, const Work& w, int64_t piece) {
  Tile tile;
  tile.first = piece % w.tiles * kTileQ;
  tile.head = piece / w.tiles % kKeyHeads;
  tile.b = piece / w.tiles / kKeyHeads;
  int64_t group = 0;
  for (int64_t h = 0; h < kHeads; ++h) @COUNT_GROUP@
  tile.count = int(maximum(minimum(@GROUP_ROWS@ - tile.first, int64_t(kTileQ)), int64_t(0)));
  find_rows(a, tile);
  return tile;
}

int32_t @RUN@(const Args& a, int threads) {
  const Work w = divide(a, threads);
  const int64_t parts = w.splits > 1 ? w.items * kTileQ : 0;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, sizeof(Scratch) * threads + sizeof(Part) * parts)) return 1;
  Scratch* const scratch = static_cast<Scratch*>(memory);
  Part* const found = reinterpret_cast<Part*>(scratch + threads);
#pragma omp parallel num_threads(threads)
  {
    Scratch& t = scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < w.items; ++item) {
      const Tile tile = tile_at(a, w, item / w.splits);
      if (tile.count == 0) continue;
      const int64_t split = item % w.splits, lo = split * w.span;
      visit(a, tile, lo, @SPLIT_END@, w.splits == 1, t);
      for (int r = 0; r < tile.count; ++r) {
        if (w.splits == 1) finish_row(a, tile.b, tile.h[r], tile.q[r], r, t);
        else keep_part(t, r, found[item * kTileQ + r]);
      }
    }
    // The parts meet in the order of the keys, whichever thread found them.
    if (w.splits > 1) {
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int64_t piece = 0; piece < w.items / w.splits; ++piece) {
        const Tile tile = tile_at(a, w, piece);
        for (int r = 0; r < tile.count; ++r) {
          start_row(a, tile.b, tile.h[r], r, t);
          memset(t.out + r * kWidth, 0, sizeof(float) * kWidth);
          for (int64_t split = 0; split < w.splits; ++split)
            join_part(found[(piece * w.splits + split) * kTileQ + r], r, t);
          finish_row(a, tile.b, tile.h[r], tile.q[r], r, t);
        }
      }
    }
  }
  free(memory);
  return 0;
}
}  // namespace
"""
