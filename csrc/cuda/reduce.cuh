// SPDX-License-Identifier: Apache-2.0
// Reductions over a warp and over a block, in a fixed order: the same bits every time.
#pragma once
#include <cuda_runtime.h>

namespace fullbeam::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // of NaN and a number: the first where it isn't smaller
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// combine() of the values of all 32 lanes, in every lane.
template <class T, class Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, bits);
    // The lower lane's value first, so that both lanes get the same bits.
    value = (threadIdx.x & bits) != 0 ? combine(other, value) : combine(value, other);
  }
  return value;
}

// The same over the block's threads along x (a multiple of 32, at most 1024), in every thread.
// `shared` has 32 places, one per warp; the block may use them again at once.
template <class T, class Combine>
__device__ inline T block_reduce(T value, T* shared, Combine combine) {
  value = warp_reduce(value, combine);
  const unsigned num_warps = blockDim.x / 32;
  if (num_warps == 1) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (unsigned warp = 1; warp < num_warps; ++warp) value = combine(value, shared[warp]);
  __syncthreads();
  return value;
}

}  // namespace fullbeam::cuda
