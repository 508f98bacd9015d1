// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) [+ residual], over the last dimension.
// `out` may be `x` or `residual`. Rows are addressed as [num_tokens, num_heads]: one norm per head
// where num_heads > 1.
struct RmsNormParams {
  const void* x;         // [num_tokens, num_heads, size], dtype
  const float* weight;   // [size]
  const void* residual;  // [num_tokens, num_heads, size], dtype, or nullptr
  void* out;             // [num_tokens, num_heads, size], dtype
  DType dtype;           // f32; on CUDA also f16 or bf16
  float eps, weight_offset;
  std::int64_t num_tokens, num_heads, size;
  std::int64_t x_stride, residual_stride, out_stride;                 // per token, in elements
  std::int64_t x_head_stride, residual_head_stride, out_head_stride;  // per head
};

FULLBEAM_DECLARE_OP(rms_norm, RmsNormParams)

}  // namespace fullbeam
