// SPDX-License-Identifier: Apache-2.0
// The activations, for gated_activation.cu and activation.cu; the forms of cpu/activations.h.
#pragma once
#include <cuda_runtime.h>

#include "ops/gated_activation.h"

namespace fullbeam::cuda {

template <Activation kActivation>
__device__ inline float activate(float g) {
  if constexpr (kActivation == Activation::silu) {
    return g / (1.0f + expf(-g));
  } else if constexpr (kActivation == Activation::gelu) {
    return 0.5f * g * erfcf(-0.70710678f * g);
  } else {
    const float cubic = fmaf(g * g * g, 0.044715f, g);
    return g / (1.0f + expf(-1.5957691216057308f * cubic));
  }
}

// Calls fn.operator()<kActivation>().
template <class Fn>
inline void dispatch_activation(Activation activation, Fn&& fn) {
  switch (activation) {
    case Activation::silu:
      return fn.template operator()<Activation::silu>();
    case Activation::gelu:
      return fn.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return fn.template operator()<Activation::gelu_tanh>();
  }
}

}  // namespace fullbeam::cuda
