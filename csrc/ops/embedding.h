// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "core/weight.h"

namespace fullbeam {

// out[i] = scale * table[token_ids[i]], dequantised. A token id outside the table gives a row of
// zeros.
struct EmbeddingParams {
  const std::int32_t* token_ids;  // [num_tokens]
  const WeightSegment* segments;  // [num_segments]
  float* out;                     // [num_tokens, cols]
  float scale;
  std::int64_t num_tokens, cols, num_segments, out_stride;
};

FULLBEAM_DECLARE_OP(embedding, EmbeddingParams)

}  // namespace fullbeam
