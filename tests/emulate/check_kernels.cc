// SPDX-License-Identifier: Apache-2.0
// Kernels with known faults, and without: what tests/test_emulate.py shows the emulation to find.
// Part of the emulated module only.
#include <cstdint>
#include <exception>
#include <string>

#include "cuda/async_copy.cuh"
#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace fullbeam::cuda {
namespace {

// Every thread publishes its number and reads its neighbour's.
void exchange(int* out, bool has_barrier) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}
void half_barrier() {
  if (threadIdx.x < 16) __syncwarp();
}
void one_thread_at_the_barrier() {
  if (threadIdx.x == 0) __syncthreads();
  if (threadIdx.x != 0) cluster_sync();
}
void past_the_end() { dynamic_shared()[blockDim.x] = 1; }
void copy(const int* from, int* out, bool waits) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  async_copy16(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  async_copy_commit();
  if (waits) async_copy_wait<0>();
  for (unsigned i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
  if (!waits) async_copy_wait<0>();
}
void ranks(int* out, bool waits) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  if (threadIdx.x == 0) *shared = static_cast<int>(blockIdx.x);
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  out[32 * blockIdx.x + threadIdx.x] = *map_shared(shared, next);
  if (waits) cluster_sync();
}
void sums(float* out) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  out[threadIdx.x] = block_reduce(static_cast<float>(threadIdx.x), shared, Sum());
}
void wait_for_launch(bool waits) {
  if (waits || threadIdx.x > 0) wait_for_launch_before();
}
void tell_device(int* out) { *out = emulate::current_device; }
// out[16, 8] = a[16, 16] b[8, 16]^T, through shared memory.
void product(const Half* a, const Half* b, float* out) {
  auto* shared = reinterpret_cast<Half*>(dynamic_shared());
  for (unsigned i = threadIdx.x; i < 256; i += 32) shared[i] = a[i];
  for (unsigned i = threadIdx.x; i < 128; i += 32) shared[256 + i] = b[i];
  __syncwarp();
  const unsigned lane = threadIdx.x;
  unsigned left[4], right[2];
  load_matrices(shared + lane % 16 * 16 + lane / 16 * 8, left);
  load_matrices(shared + 256 + lane % 8 * 16 + lane / 8 % 2 * 8, right);
  float d[4] = {};
  multiply_add<Half>(left, right, d);
  for (unsigned i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

// A stream of another device, new to the library, while a graph is captured from it or not.
class OtherStream {
 public:
  OtherStream(int number, bool is_captured) {
    current_stream() = {reinterpret_cast<void*>(std::intptr_t{number}), 1};
    emulate::captured_stream = current_stream().handle;
    emulate::is_capturing = is_captured;
  }
  ~OtherStream() {
    current_stream() = {};
    emulate::is_capturing = false;
  }
};
void take_memory(int* out, bool is_captured) {
  const OtherStream stream(is_captured ? 2 : 3, is_captured);
  for (const std::int64_t count : {8, 1 << 20}) {
    const unsigned* zeros = counters(count);
    for (std::int64_t i = 0; i < count; ++i) out[0] += zeros[i] != 0 ? 1 : 0;
    out[1] += workspace(count) != nullptr ? 1 : 0;
  }
}

}  // namespace
}  // namespace fullbeam::cuda

// Runs a kernel by name; what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* emulate_check(const char* name,
                                                                            const void* in,
                                                                            const void* more,
                                                                            void* out) {
  using namespace fullbeam::cuda;
  static thread_local std::string said;
  const std::string kernel = name;
  auto* ints = static_cast<int*>(out);
  try {
    if (kernel == "exchange" || kernel == "exchange without a barrier") {
      launch(&exchange, {.grid = 1, .block = 64, .shared_bytes = 256}, ints, kernel == "exchange");
    } else if (kernel == "half a warp at a barrier") {
      launch(&half_barrier, {.grid = 1, .block = 32});
    } else if (kernel == "one thread at the barrier") {
      launch(&one_thread_at_the_barrier, {.grid = 1, .block = 32});
    } else if (kernel == "past the end") {
      launch(&past_the_end, {.grid = 1, .block = 32, .shared_bytes = 32});
    } else if (kernel == "copy" || kernel == "copy without waiting") {
      launch(&copy, {.grid = 1, .block = 32, .shared_bytes = 512}, static_cast<const int*>(in),
             ints, kernel == "copy");
    } else if (kernel == "ranks" || kernel == "ranks without waiting") {
      launch(&ranks, {.grid = 8, .block = 32, .shared_bytes = 16, .cluster = 4}, ints,
             kernel == "ranks");
    } else if (kernel == "sums") {
      launch(&sums, {.grid = 1, .block = 256, .shared_bytes = 128}, static_cast<float*>(out));
    } else if (kernel == "product") {
      launch(&product, {.grid = 1, .block = 32, .shared_bytes = 768}, static_cast<const Half*>(in),
             static_cast<const Half*>(more), static_cast<float*>(out));
    } else if (kernel == "overlap" || kernel == "overlap without waiting") {
      launch(&wait_for_launch, {.grid = 1, .block = 32, .overlaps = true}, kernel == "overlap");
    } else if (kernel == "tell the device") {
      const OtherStream stream(1, false);
      launch(&tell_device, {.grid = 1, .block = 1}, ints);
      ints[1] = emulate::current_device;
    } else if (kernel == "take memory" || kernel == "take memory in a capture") {
      take_memory(ints, kernel == "take memory in a capture");
    } else if (kernel == "allocate in a capture") {
      const OtherStream stream(4, true);
      void* memory;
      FULLBEAM_CUDA_CALL(cudaMalloc(&memory, 1));
    } else if (kernel == "too much shared memory") {
      launch(&half_barrier, {.grid = 1, .block = 32, .shared_bytes = 300 << 10});
    }
    return "";
  } catch (const std::exception& error) {
    said = error.what();
    return said.c_str();
  }
}
