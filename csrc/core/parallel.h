// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
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

// The same for fn(thread_idx, num_threads).
template <class Fn>
inline void run_team(const Fn& fn) {
  run_team([](void* raw, int thread_idx,
              int num_threads) { (*static_cast<const Fn*>(raw))(thread_idx, num_threads); },
           const_cast<Fn*>(&fn));
}

// The threads of a region meet here, once.
class Barrier {
 public:
  explicit Barrier(int num_threads) : left_(num_threads) {}
  void wait();

 private:
  std::atomic<int> left_;
};

// Splits [0, count) in contiguous ranges of multiples of `grain`, one per thread, and calls
// fn(begin, end).
template <class Fn>
inline void parallel_for(std::int64_t count, std::int64_t grain, Fn&& fn) {
  if (count <= grain || num_threads() == 1) {
    if (count > 0) fn(std::int64_t{0}, count);
    return;
  }
  run_team([&](int thread_idx, int num_threads) {
    const std::int64_t num_grains = (count + grain - 1) / grain;
    const std::int64_t begin = num_grains * thread_idx / num_threads * grain;
    std::int64_t end = num_grains * (thread_idx + 1) / num_threads * grain;
    if (end > count) end = count;
    if (begin < end) fn(begin, end);
  });
}

// [0, count) in chunks of `chunk`, for work of uneven cost: a contiguous share per thread, which it
// takes in order, and what is left of the others' when it has done its own.
class Chunks {
 public:
  Chunks(std::int64_t count, std::int64_t chunk, int num_threads)
      : chunk_(chunk), num_shares_(num_threads < kMaxShares ? num_threads : kMaxShares) {
    const std::int64_t num_chunks = (count + chunk - 1) / chunk;
    for (int i = 0; i < num_shares_; ++i) {
      shares_[i].next = num_chunks * i / num_shares_ * chunk;
      shares_[i].end = i + 1 < num_shares_ ? num_chunks * (i + 1) / num_shares_ * chunk : count;
    }
  }
  // Calls fn(begin, end) for the chunks that fall to the thread.
  template <class Fn>
  void run(int thread_idx, Fn&& fn) {
    for (int i = 0; i < num_shares_; ++i) {
      Share& share = shares_[(thread_idx + i) % num_shares_];
      for (;;) {
        const std::int64_t begin = __atomic_fetch_add(&share.next, chunk_, __ATOMIC_RELAXED);
        if (begin >= share.end) break;
        fn(begin, begin + chunk_ < share.end ? begin + chunk_ : share.end);
      }
    }
  }

 private:
  static constexpr int kMaxShares = 64;
  struct alignas(64) Share {
    std::int64_t next, end;
  };
  Share shares_[kMaxShares];
  std::int64_t chunk_;
  int num_shares_;
};

// fn(begin, end) for [0, count) by Chunks.
template <class Fn>
inline void parallel_chunks(std::int64_t count, std::int64_t chunk, Fn&& fn) {
  if (count <= chunk || num_threads() == 1) {
    if (count > 0) fn(std::int64_t{0}, count);
    return;
  }
  Chunks chunks(count, chunk, num_threads());
  run_team([&](int thread_idx, int) { chunks.run(thread_idx, fn); });
}

// Grow-only memory of the calling thread for intermediate results of one op, 64-byte aligned; the
// next op reuses it.
void* scratch(std::int64_t bytes);

}  // namespace fullbeam
