// SPDX-License-Identifier: Apache-2.0
// Activation: out = activation(x).
// Mapping: a thread takes 16 bytes of a row, or one element where an address is not a multiple of
// 16. Cost: reads and writes size numbers a row: memory-bound. Numerics: float32, the forms of
// cpu/activations.h with CUDA's expf and erfcf (2 and 4 ulp). Source: as there.
#include "cuda/activations.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/activation.h"

namespace fullbeam::cuda {
namespace {

template <Activation kActivation, class T, int kItems>
__global__ void __launch_bounds__(256) activate_rows(const __grid_constant__ ActivationParams p) {
  const std::int64_t row = blockIdx.x, first = first_item<kItems>();
  if (first >= p.size) return;
  float items[kItems];
  load_floats(static_cast<const T*>(p.x) + row * p.x_stride + first, items);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] = activate<kActivation>(items[i]);
  store_floats(items, static_cast<T*>(p.out) + row * p.out_stride + first);
}

}  // namespace

void activation(const ActivationParams& p) {
  if (p.num_tokens == 0 || p.size == 0) return;
  dispatch_float(p.dtype, [&]<class T>() {
    constexpr int kItems = 16 / sizeof(T);
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned = is_aligned16({address_of(p.x), address_of(p.out), p.size * bytes,
                                          p.x_stride * bytes, p.out_stride * bytes});
    dispatch_activation(p.activation, [&]<Activation kActivation>() {
      launch(
          is_aligned ? &activate_rows<kActivation, T, kItems> : &activate_rows<kActivation, T, 1>,
          shape_by_threads(p.num_tokens, is_aligned ? p.size / kItems : p.size), p);
    });
  });
}

}  // namespace fullbeam::cuda
