// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/async_copy.cuh. A copy happens as late as it may, when its
// thread waits for it: what reads the data before that finds the NaN that shared memory starts as.
#pragma once
#include <cstdint>

#include "cuda_runtime.h"

namespace fullbeam::cuda {

inline void async_copy16(void* to_shared, const void* from, bool is_valid = true) {
  if (reinterpret_cast<std::uintptr_t>(to_shared) % 16 != 0 ||
      (is_valid && reinterpret_cast<std::uintptr_t>(from) % 16 != 0)) {
    emulate::fail("async_copy16: an address is no multiple of 16");
  }
  emulate::Fiber& f = *emulate::fiber;
  f.copies.push_back({to_shared, is_valid ? from : nullptr, 16, f.num_copy_groups});
}

inline void async_copy_commit() { ++emulate::fiber->num_copy_groups; }

template <int kPending>
inline void async_copy_wait() {
  emulate::Fiber& f = *emulate::fiber;
  std::erase_if(f.copies, [&](const emulate::AsyncCopy& copy) {
    if (copy.group >= f.num_copy_groups - kPending) return false;
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, static_cast<std::size_t>(copy.num_bytes));
    } else {
      std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.num_bytes));
    }
    return true;
  });
}

}  // namespace fullbeam::cuda
