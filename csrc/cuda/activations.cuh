// SPDX-License-Identifier: Apache-2.0
// The kernel of activation.cu and gated_activation.cu: out = activation(x), or activation(gate) *
// up where a row of x is gate | up.
// Mapping: a thread takes 16 bytes of a row, and of up the 16 that belong to them, or one element
// where an address is not a multiple of 16. Cost: reads and writes each number once: memory-bound.
// Numerics: float32, the forms of cpu/activations.h with CUDA's expf and erfcf (2 and 4 ulp).
#pragma once
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/gated_activation.h"

namespace fullbeam::cuda {
namespace {

template <int kItems>
__device__ inline void activate(Activation activation, float (&items)[kItems]) {
  switch (activation) {
    case Activation::silu:
#pragma unroll
      for (float& g : items) g = g / (1.0f + expf(-g));
      break;
    case Activation::gelu:
#pragma unroll
      for (float& g : items) g = 0.5f * g * erfcf(-0.70710678f * g);
      break;
    case Activation::gelu_tanh:
#pragma unroll
      for (float& g : items) {
        const float cubic = fmaf(g * g * g, 0.044715f, g);
        g = g / (1.0f + expf(-1.5957691216057308f * cubic));
      }
      break;
  }
}

template <bool kIsGated, class T, int kItems, class Params>
__global__ void __launch_bounds__(256) activate_rows(const __grid_constant__ Params p) {
  const std::int64_t row = blockIdx.x, first = first_item<kItems>();
  if (first >= p.size) return;
  const T* from = static_cast<const T*>(p.x) + row * p.x_stride + first;
  float items[kItems];
  load_floats(from, items);
  activate(p.activation, items);
  if constexpr (kIsGated) {
    float up[kItems];
    load_floats(from + p.size, up);
#pragma unroll
    for (int i = 0; i < kItems; ++i) items[i] *= up[i];
  }
  store_floats(items, static_cast<T*>(p.out) + row * p.out_stride + first);
}

template <bool kIsGated, class Params>
inline void launch_activation(const Params& p) {
  if (p.num_tokens == 0 || p.size == 0) return;
  dispatch_float(p.dtype, [&]<class T>() {
    constexpr int kItems = 16 / sizeof(T);
    const std::int64_t bytes = sizeof(T);
    const bool is_aligned = is_aligned16({address_of(p.x), address_of(p.out), p.size * bytes,
                                          p.x_stride * bytes, p.out_stride * bytes});
    launch(is_aligned ? &activate_rows<kIsGated, T, kItems, Params>
                      : &activate_rows<kIsGated, T, 1, Params>,
           shape_by_threads(p.num_tokens, is_aligned ? p.size / kItems : p.size), p);
  });
}

}  // namespace
}  // namespace fullbeam::cuda
