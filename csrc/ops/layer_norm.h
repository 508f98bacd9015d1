// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension. `out` may be
// `x`.
struct LayerNormParams {
  const void* x;        // [num_tokens, size], dtype
  const float* weight;  // [size]
  const float* bias;    // [size]
  void* out;            // [num_tokens, size], dtype
  DType dtype;          // f32; on CUDA also f16 or bf16
  float eps;
  std::int64_t num_tokens, size;
  std::int64_t x_stride, out_stride;  // per token, in elements
};

FULLBEAM_DECLARE_OP(layer_norm, LayerNormParams)

}  // namespace fullbeam
