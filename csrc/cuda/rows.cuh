// SPDX-License-Identifier: Apache-2.0
// How rows of numbers are shared out: by threads (element-wise ops), or by warps and blocks
// (norms).
#pragma once
#include <cstdint>

#include "cuda/launch.cuh"

namespace fullbeam::cuda {

// A thread takes kItems neighbours of a row: row blockIdx.x, first column first_item<kItems>().
template <int kItems>
__device__ inline std::int64_t first_item() {
  return (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kItems;
}

inline Shape shape_by_threads(std::int64_t num_rows, std::int64_t threads_per_row) {
  const std::int64_t threads = threads_per_row >= 256 ? 256 : (threads_per_row + 31) / 32 * 32;
  return {.grid = dim3(static_cast<unsigned>(num_rows),
                       static_cast<unsigned>((threads_per_row + threads - 1) / threads)),
          .block = static_cast<unsigned>(threads)};
}

// A warp takes a short row, a block a long one: row_of_threads(), its threads being those along x.
// Shared memory is for block_reduce of floats.
__device__ inline std::int64_t row_of_threads() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

inline Shape shape_by_rows(std::int64_t num_rows, std::int64_t size) {
  const unsigned threads = size <= 1024 ? 32 : size <= 4096 ? 256 : 1024;
  const unsigned rows_per_block = threads == 32 ? 4 : 1;
  return {.grid = static_cast<unsigned>((num_rows + rows_per_block - 1) / rows_per_block),
          .block = dim3(threads, rows_per_block),
          .shared_bytes = 32 * sizeof(float)};
}

}  // namespace fullbeam::cuda
