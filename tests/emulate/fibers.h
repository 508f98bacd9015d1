// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for the tests: a thread of a block is a fiber, and fibers change
// over only where CUDA's threads wait for each other, so each such point is chosen at random among
// those that can go on. The blocks of a grid (or its clusters) run one after another, in random
// order. What it shows: indexing, layouts, missing barriers, reads of shared memory that nobody
// wrote (it starts as NaN), writes past its end. What it can't show: races between blocks, the
// GPU's own rounding of exp2f and its like, bank conflicts, speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulate {

struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
  int num_bytes;
  int group;
};

struct Fiber;

struct Warp {
  unsigned arrived = 0;  // lanes that wait in a collective
  Fiber* fibers[32];
  void* lane_data[32];
  unsigned masks[32];
  const char* names[32];
};

struct Barrier {
  int num_arrived = 0, sum = 0, result = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  uint3 block_idx;
  unsigned cluster_rank;
  char* shared;
  int num_live;
  std::vector<Warp> warps;
  Barrier barrier;
};

struct Fiber {
  uint3 thread_idx;
  Block* block;
  int warp, lane;
  void* stack_pointer;
  char* stack;
  void* fake_stack;  // the address sanitizer's
  bool is_finished;
  const char* waits_at;
  bool has_waited;  // for the launch before
  bool has_arrived_at_cluster;
  int cluster_phase;  // at its arrival
  int num_copy_groups, num_done_groups;
  std::vector<AsyncCopy> copies;
};

struct Grid {
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;   // blocks, along x
  bool overlaps = false;  // the launch before
};

extern Fiber* fiber;  // the thread that runs now
extern std::size_t shared_size;
extern unsigned cluster_size;

// What the emulated device is; set by the tests (emulate_set_device).
struct Device {
  int major = 9, minor = 0, num_sms = 4, shared_bytes = 227 << 10;  // of a block
  int max_cluster = 8;                                              // blocks
};
extern Device device;
extern int current_device;  // the thread's

// The stream that is captured for a graph, if any.
extern const void* captured_stream;
extern bool is_capturing, is_capture_relaxed;
inline bool is_captured(const void* stream) { return is_capturing && stream == captured_stream; }
inline bool may_wait(const void* stream) {
  return !is_capturing || (is_capture_relaxed && !is_captured(stream));
}

void run_grid(const Grid& grid, const std::function<void()>& kernel);
[[noreturn]] void fail(const std::string& what);

// Waits for every thread of the block that has not returned; the number of those that gave true.
int block_barrier(bool value, const char* name);
void cluster_arrive();
void cluster_wait();
// This block's shared memory address, in the block of that rank of the cluster.
void* in_block_of_rank(void* shared, unsigned rank);

// Records the lane and waits until all lanes of the mask are here; true for the last one, which
// does the work for all and then calls `release`.
bool arrive_in_warp(unsigned mask, const char* name, void* lane_data);
void release_warp(unsigned mask);

// A warp operation: every lane of `mask` brings a `Lane`; the last to come calls complete(lanes)
// with their addresses (null for the lanes outside of the mask), which reads and writes all of
// them.
template <class Lane, class Complete>
inline void collective(unsigned mask, const char* name, Lane& lane, Complete&& complete) {
  if (!arrive_in_warp(mask, name, &lane)) return;
  Lane* lanes[32];
  for (int i = 0; i < 32; ++i) {
    const bool is_in = (mask >> i & 1) != 0;
    lanes[i] = is_in ? static_cast<Lane*>(
                           fiber->block->warps[static_cast<std::size_t>(fiber->warp)].lane_data[i])
                     : nullptr;
  }
  complete(lanes);
  release_warp(mask);
}

}  // namespace emulate
