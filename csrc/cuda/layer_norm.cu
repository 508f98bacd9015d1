// SPDX-License-Identifier: Apache-2.0
// Layer norm: out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
// Mapping: a warp takes a short row, a block a long one; a thread takes every threads-per-row-th
// run of 16 bytes, or single elements where an address is not a multiple of 16. Cost: reads x three
// times (twice from L1), weight and bias from L2; writes out: memory-bound. Numerics: float32 sums
// per thread, added over the row's threads in a fixed order; the variance is that of x - mean, in a
// pass of its own that also finds what rounding left of the mean. Source: Ba, Kiros and Hinton 2016
// (arXiv 1607.06450), eq. 4.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/layer_norm.h"

namespace fullbeam::cuda {
namespace {

template <class T, int kItems>
__global__ void __launch_bounds__(1024) norm_rows(const __grid_constant__ LayerNormParams p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const std::int64_t row = row_of_threads();
  if (row >= p.num_tokens) return;  // rows of warps only: no barrier follows
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kItems,
                     step = static_cast<std::int64_t>(blockDim.x) * kItems;
  const auto size = static_cast<float>(p.size);

  float sum = 0.0f;
  for (std::int64_t i = first; i < p.size; i += step) {
    float items[kItems];
    load_floats(x + i, items);
#pragma unroll
    for (int j = 0; j < kItems; ++j) sum += items[j];
  }
  const float mean = block_reduce(sum, shared, Sum()) / size;

  float rest = 0.0f, square = 0.0f;
  for (std::int64_t i = first; i < p.size; i += step) {
    float items[kItems];
    load_floats(x + i, items);
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const float centred = items[j] - mean;
      rest += centred;
      square = fmaf(centred, centred, square);
    }
  }
  rest = block_reduce(rest, shared, Sum()) / size;
  square = block_reduce(square, shared, Sum()) / size;
  const float scale = 1.0f / sqrtf(square - rest * rest + p.eps);

  for (std::int64_t i = first; i < p.size; i += step) {
    float items[kItems], weight[kItems], bias[kItems];
    load_floats(x + i, items);
    load_floats(p.weight + i, weight);
    load_floats(p.bias + i, bias);
#pragma unroll
    for (int j = 0; j < kItems; ++j)
      items[j] = (items[j] - mean - rest) * scale * weight[j] + bias[j];
    store_floats(items, out + i);
  }
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  if (p.num_tokens == 0 || p.size == 0) return;
  const Shape shape = shape_by_rows(p.num_tokens, p.size);
  dispatch_float(p.dtype, [&]<class T>() {
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned =
        is_aligned16({address_of(p.x), address_of(p.weight), address_of(p.bias), address_of(p.out),
                      p.size * bytes, p.x_stride * bytes, p.out_stride * bytes});
    launch(is_aligned ? &norm_rows<T, 16 / sizeof(T)> : &norm_rows<T, 1>, shape, p);
  });
}

}  // namespace fullbeam::cuda
