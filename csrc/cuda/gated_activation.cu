// SPDX-License-Identifier: Apache-2.0
// Gated activation: out = activation(gate) * up, where a row of x is gate | up.
// Mapping: a thread takes 16 bytes of gate and the 16 of up that belong to them, or one element of
// each where an address is not a multiple of 16. Cost: reads 2 * size numbers a row, writes size:
// memory-bound. Numerics: float32, the forms of cpu/activations.h with CUDA's expf and erfcf (2 and
// 4 ulp). Source: Shazeer 2020 (arXiv 2002.05202).
#include "cuda/activations.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/gated_activation.h"

namespace fullbeam::cuda {
namespace {

template <Activation kActivation, class T, int kItems>
__global__ void __launch_bounds__(256) gate_rows(const __grid_constant__ GatedActivationParams p) {
  const std::int64_t row = blockIdx.x, first = first_item<kItems>();
  if (first >= p.size) return;
  const T* gate = static_cast<const T*>(p.x) + row * p.x_stride + first;
  float items[kItems], up[kItems];
  load_floats(gate, items);
  load_floats(gate + p.size, up);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] = activate<kActivation>(items[i]) * up[i];
  store_floats(items, static_cast<T*>(p.out) + row * p.out_stride + first);
}

}  // namespace

void gated_activation(const GatedActivationParams& p) {
  if (p.num_tokens == 0 || p.size == 0) return;
  dispatch_float(p.dtype, [&]<class T>() {
    constexpr int kItems = 16 / sizeof(T);
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned = is_aligned16({address_of(p.x), address_of(p.out), p.size * bytes,
                                          p.x_stride * bytes, p.out_stride * bytes});
    dispatch_activation(p.activation, [&]<Activation kActivation>() {
      launch(is_aligned ? &gate_rows<kActivation, T, kItems> : &gate_rows<kActivation, T, 1>,
             shape_by_threads(p.num_tokens, is_aligned ? p.size / kItems : p.size), p);
    });
  });
}

}  // namespace fullbeam::cuda
