// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "ops/gated_activation.h"

namespace fullbeam {

// out = activation(x). `out` may be `x`.
struct ActivationParams {
  const void* x;  // [num_tokens, size], dtype
  void* out;      // [num_tokens, size], dtype
  DType dtype;    // f32; on CUDA also f16 or bf16
  Activation activation;
  std::int64_t num_tokens, size;
  std::int64_t x_stride, out_stride;  // per token, in elements
};

FULLBEAM_DECLARE_OP(activation, ActivationParams)

}  // namespace fullbeam
