// SPDX-License-Identifier: Apache-2.0
// Root-mean-square norm: out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) [+ residual].
// Mapping: a warp takes a short row (heads), a block a long one; a thread takes every
// threads-per-row-th run of 16 bytes, or single elements where an address is not a multiple of 16.
// Cost: reads x twice (the second time from L1), weight from L2, residual; writes out:
// memory-bound. Numerics: float32 sums per thread, added over the row's threads in a fixed order,
// whatever the batch. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4; the offset is
// Gemma's.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/rms_norm.h"

namespace fullbeam::cuda {
namespace {

template <class T, int kItems>
__global__ void __launch_bounds__(1024) norm_rows(const __grid_constant__ RmsNormParams p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const std::int64_t row = row_of_threads();
  if (row >= p.num_tokens * p.num_heads) return;  // rows of warps only: no barrier follows
  const std::int64_t token = row / p.num_heads, head = row % p.num_heads;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride + head * p.x_head_stride;
  const T* residual = static_cast<const T*>(p.residual);
  if (residual != nullptr) residual += token * p.residual_stride + head * p.residual_head_stride;
  T* out = static_cast<T*>(p.out) + token * p.out_stride + head * p.out_head_stride;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kItems,
                     step = static_cast<std::int64_t>(blockDim.x) * kItems;

  float sum = 0.0f;
  for (std::int64_t i = first; i < p.size; i += step) {
    float items[kItems];
    load_floats(x + i, items);
#pragma unroll
    for (int j = 0; j < kItems; ++j) sum = fmaf(items[j], items[j], sum);
  }
  sum = block_reduce(sum, shared, Sum());
  const float scale = 1.0f / sqrtf(sum / static_cast<float>(p.size) + p.eps);

  for (std::int64_t i = first; i < p.size; i += step) {
    float items[kItems], weight[kItems];
    load_floats(x + i, items);
    load_floats(p.weight + i, weight);
#pragma unroll
    for (int j = 0; j < kItems; ++j) items[j] = items[j] * scale * (weight[j] + p.weight_offset);
    if (residual != nullptr) {
      float more[kItems];
      load_floats(residual + i, more);
#pragma unroll
      for (int j = 0; j < kItems; ++j) items[j] += more[j];
    }
    store_floats(items, out + i);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const std::int64_t num_rows = p.num_tokens * p.num_heads;
  if (num_rows == 0 || p.size == 0) return;
  const Shape shape = shape_by_rows(num_rows, p.size);
  dispatch_float(p.dtype, [&]<class T>() {
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned = is_aligned16(
        {address_of(p.x), address_of(p.weight), address_of(p.residual), address_of(p.out),
         p.size * bytes, p.x_stride * bytes, p.x_head_stride * bytes, p.residual_stride * bytes,
         p.residual_head_stride * bytes, p.out_stride * bytes, p.out_head_stride * bytes});
    launch(is_aligned ? &norm_rows<T, 16 / sizeof(T)> : &norm_rows<T, 1>, shape, p);
  });
}

}  // namespace fullbeam::cuda
