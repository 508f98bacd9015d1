// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// Rotates pairs of the first 2 * num_freqs numbers of each head by position * inv_freq, in place,
// and multiplies them by `scale`; the rest of the head stays. A pair is (2i, 2i + 1) where
// interleaved, else (i, i + num_freqs).
struct RopeParams {
  void* x;                        // [num_tokens, num_heads, head_dim], dtype, in and out
  DType dtype;                    // f32; on CUDA also f16 or bf16
  const std::int32_t* positions;  // [num_tokens]; |position * inv_freq| below 2^31
  const float* inv_freq;          // [num_freqs], radians per position
  float scale;
  bool is_interleaved;
  std::int64_t num_tokens, num_heads, num_freqs, head_dim;
  std::int64_t token_stride, head_stride;  // of x, in elements
};

FULLBEAM_DECLARE_OP(rope, RopeParams)

}  // namespace fullbeam
