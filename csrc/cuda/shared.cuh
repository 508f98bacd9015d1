// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

namespace fullbeam::cuda {

// The block's shared memory, all of it dynamic: as many bytes as the launch asked for, 128-byte
// aligned, undefined at the start.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

}  // namespace fullbeam::cuda
