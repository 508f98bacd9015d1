// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

enum class Activation : std::int32_t { silu, gelu, gelu_tanh };

// out = activation(gate) * up, where a row of x is gate | up. `out` may be the first half of `x`.
struct GatedActivationParams {
  const void* x;  // [num_tokens, 2 * size], dtype
  void* out;      // [num_tokens, size], dtype
  DType dtype;    // f32; on CUDA also f16 or bf16
  Activation activation;
  std::int64_t num_tokens, size;
  std::int64_t x_stride, out_stride;  // per token, in elements
};

FULLBEAM_DECLARE_OP(gated_activation, GatedActivationParams)

}  // namespace fullbeam
