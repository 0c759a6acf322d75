"""What this processor can do at this moment: multiply-adds and reads, by code compiled like the kernels."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from attnopt.codegen import cpp
from attnopt.options import Options
from attnopt.runtime.compile import compile_shared, find_compiler, vector_lanes

_SOURCE = r"""
#include <stdint.h>
constexpr int kLanes = @LANES@, kSums = 12;
typedef float VF __attribute__((vector_size(4 * kLanes)));

extern "C" float probe_multiply(int64_t turns) {
  VF sum[kSums], x = VF{} + 0.999f, y = VF{} + 0.001f;
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sum[i] = VF{} + float(i);
  for (int64_t t = 0; t < turns; ++t)
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * x + y;
  float total = 0;
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i)
    for (int lane = 0; lane < kLanes; ++lane) total += sum[i][lane];
  return total;
}

extern "C" float probe_read(const float* data, int64_t count) {
  VF sum[8] = {};
  for (int64_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] += *reinterpret_cast<const VF*>(data + i + j * kLanes);
  float total = 0;
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < kLanes; ++lane) total += sum[j][lane];
  return total;
}
"""
TURNS = 400_000
BYTES = 1 << 26


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    options = Options.make()
    with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
        source, target = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_SOURCE.replace("@LANES@", str(vector_lanes())))
        compile_shared(find_compiler(options), source, target, cpp.FLAGS, options.compile_timeout)
        library = ctypes.CDLL(str(target))
    library.probe_multiply.argtypes, library.probe_multiply.restype = (ctypes.c_int64,), ctypes.c_float
    library.probe_read.argtypes, library.probe_read.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    return library


@functools.lru_cache(maxsize=1)
def _memory() -> ctypes.Array[ctypes.c_float]:
    memory = (ctypes.c_float * (BYTES // 4 + 16))()
    ctypes.memset(memory, 1, ctypes.sizeof(memory))
    return memory


def peak(clock: Callable[[], float]) -> float:
    """Floating-point operations a second of one thread, multiply-adds as two."""
    library = _library()
    start = clock()
    library.probe_multiply(TURNS)
    return TURNS * 12 * vector_lanes() * 2 / (clock() - start)


def read_rate(clock: Callable[[], float], threads: int = 1) -> float:
    """Bytes a second that so many threads together read from memory beyond the caches."""
    library, memory = _library(), _memory()
    address, share = -(-ctypes.addressof(memory) // 64) * 64, BYTES // 4 // threads // 1024 * 1024

    def read(part: int) -> None:
        library.probe_read(address + 4 * share * part, share)

    if threads == 1:
        start = clock()
        read(0)
        return 4 * share / (clock() - start)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(int, range(threads)))  # starts them
        start = clock()
        list(pool.map(read, range(threads)))
        return 4 * share * threads / (clock() - start)
