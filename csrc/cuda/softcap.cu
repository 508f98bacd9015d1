// SPDX-License-Identifier: Apache-2.0
// Soft cap of logits: out = cap * tanh(x / cap).
// Mapping: a thread takes 16 bytes of a row, or one element where an address is not a multiple of
// 16. Cost: reads and writes size numbers a row: memory-bound. Numerics: float32, CUDA's tanhf (2
// ulp). Source: Gemma 2 (arXiv 2408.00118), section 2.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/softcap.h"

namespace fullbeam::cuda {
namespace {

template <class T, int kItems>
__global__ void __launch_bounds__(256) cap_rows(const __grid_constant__ SoftcapParams p) {
  const std::int64_t row = blockIdx.x, first = first_item<kItems>();
  if (first >= p.size) return;
  float items[kItems];
  load_floats(static_cast<const T*>(p.x) + row * p.x_stride + first, items);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] = p.cap * tanhf(items[i] / p.cap);
  store_floats(items, static_cast<T*>(p.out) + row * p.out_stride + first);
}

}  // namespace

void softcap(const SoftcapParams& p) {
  if (p.num_rows == 0 || p.size == 0) return;
  dispatch_float(p.dtype, [&]<class T>() {
    constexpr int kItems = 16 / sizeof(T);
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned = is_aligned16({address_of(p.x), address_of(p.out), p.size * bytes,
                                          p.x_stride * bytes, p.out_stride * bytes});
    launch(is_aligned ? &cap_rows<T, kItems> : &cap_rows<T, 1>,
           shape_by_threads(p.num_rows, is_aligned ? p.size / kItems : p.size), p);
  });
}

}  // namespace fullbeam::cuda
