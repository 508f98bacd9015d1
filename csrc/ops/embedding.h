// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "core/weight.h"

namespace fullbeam {

// out[i] = scale * table[token_ids[i]] [+ residual[i]], dequantised. A token id outside the table
// counts as a row of zeros. `out` may be `residual`.
struct EmbeddingParams {
  const std::int32_t* token_ids;  // [num_tokens]
  const WeightSegment* segments;  // [num_segments]
  const float* residual;          // [num_tokens, cols] or nullptr
  float* out;                     // [num_tokens, cols]
  float scale;
  std::int64_t num_tokens, cols, num_segments, residual_stride, out_stride;
};

FULLBEAM_DECLARE_OP(embedding, EmbeddingParams)

}  // namespace fullbeam
