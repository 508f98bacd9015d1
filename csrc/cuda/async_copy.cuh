// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run beside the thread which asked for them.
#pragma once
#include <cuda_runtime.h>

namespace fullbeam::cuda {

// 16 bytes, both addresses multiples of 16; zeros, and `from` is not read, where not valid.
__device__ inline void async_copy16(void* to_shared, const void* from, bool is_valid = true) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(is_valid ? 16 : 0)
               : "memory");
}

// Closes a group: this thread's copies since the last one.
__device__ inline void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way. Other threads see the
// data after a barrier only.
template <int kPending>
__device__ inline void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fullbeam::cuda
