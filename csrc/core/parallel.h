// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "core/api.h"

namespace fullbeam {

// How many threads the calling thread's ops use, itself included. Default: the number of physical
// cores.
FULLBEAM_API int num_threads();
FULLBEAM_API void set_num_threads(int count);
FULLBEAM_API int num_physical_cores();

// Runs body(context, thread_idx) once on each of num_threads() threads, the caller being thread 0,
// and returns when all have. Workers wait for the next region by spinning for a few tens of
// microseconds, then sleep.
void run_team(void (*body)(void* context, int thread_idx, int num_threads), void* context);

// Splits [0, count) in contiguous ranges of multiples of `grain`, one per thread, and calls
// fn(begin, end).
template <class Fn>
inline void parallel_for(std::int64_t count, std::int64_t grain, Fn&& fn) {
  struct Context {
    std::int64_t count, grain;
    Fn* fn;
  } context{count, grain, &fn};
  if (count <= grain || num_threads() == 1) {
    if (count > 0) fn(std::int64_t{0}, count);
    return;
  }
  run_team(
      [](void* raw, int thread_idx, int num_threads) {
        const Context& c = *static_cast<Context*>(raw);
        const std::int64_t num_grains = (c.count + c.grain - 1) / c.grain;
        const std::int64_t begin = num_grains * thread_idx / num_threads * c.grain;
        std::int64_t end = num_grains * (thread_idx + 1) / num_threads * c.grain;
        if (end > c.count) end = c.count;
        if (begin < end) (*c.fn)(begin, end);
      },
      &context);
}

// The same in chunks of `chunk` that the threads take as they become free, for work of uneven cost.
template <class Fn>
inline void parallel_chunks(std::int64_t count, std::int64_t chunk, Fn&& fn) {
  struct Context {
    std::int64_t count, chunk, next;
    Fn* fn;
  } context{count, chunk, 0, &fn};
  if (count <= chunk || num_threads() == 1) {
    if (count > 0) fn(std::int64_t{0}, count);
    return;
  }
  run_team(
      [](void* raw, int, int) {
        Context& c = *static_cast<Context*>(raw);
        for (;;) {
          const std::int64_t begin = __atomic_fetch_add(&c.next, c.chunk, __ATOMIC_RELAXED);
          if (begin >= c.count) return;
          (*c.fn)(begin, begin + c.chunk < c.count ? begin + c.chunk : c.count);
        }
      },
      &context);
}

// Grow-only memory of the calling thread for intermediate results of one op, 64-byte aligned; the
// next op reuses it.
void* scratch(std::int64_t bytes);

}  // namespace fullbeam
