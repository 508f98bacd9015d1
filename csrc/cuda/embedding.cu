// SPDX-License-Identifier: Apache-2.0
// Embedding look-up: out[i] = scale * table[token_ids[i]] [+ residual[i]], from a dense table.
// Mapping: a thread takes 8 columns of a token, or one where an address is not a multiple of 16.
// Cost: reads a row of the table and of the residual per token, writes one: memory-bound. Numerics:
// float32. Source: none; packed tables are the CPU's, a device holds its weights dequantised.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/embedding.h"

namespace fullbeam::cuda {
namespace {

template <class T, class Out, int kItems>
__global__ void __launch_bounds__(256) look_up(const __grid_constant__ EmbeddingParams p) {
  const std::int64_t token = blockIdx.x, first = first_item<kItems>();
  if (first >= p.cols) return;
  const std::int64_t row = p.token_ids[token];
  float items[kItems] = {};
  if (row >= 0 && row < p.table_rows)
    load_floats(static_cast<const T*>(p.table) + row * p.table_stride + first, items);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] *= p.scale;
  if (p.residual != nullptr) {
    float more[kItems];
    load_floats(static_cast<const Out*>(p.residual) + token * p.residual_stride + first, more);
#pragma unroll
    for (int i = 0; i < kItems; ++i) items[i] += more[i];
  }
  store_floats(items, static_cast<Out*>(p.out) + token * p.out_stride + first);
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  if (p.num_tokens == 0 || p.cols == 0) return;
  dispatch_float(p.table_dtype, [&]<class T>() {
    dispatch_float(p.dtype, [&]<class Out>() {
      constexpr int kItems = 8;
      const std::int64_t in = sizeof(T), out = sizeof(Out);
      const bool is_aligned =
          p.cols % kItems == 0 &&
          is_aligned16({address_of(p.table), address_of(p.residual), address_of(p.out),
                        p.table_stride * in, p.residual_stride * out, p.out_stride * out});
      launch(is_aligned ? &look_up<T, Out, kItems> : &look_up<T, Out, 1>,
             shape_by_threads(p.num_tokens, is_aligned ? p.cols / kItems : p.cols), p);
    });
  });
}

}  // namespace fullbeam::cuda
