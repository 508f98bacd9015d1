// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "core/weight.h"

namespace fullbeam {

// out[i] = scale * table[token_ids[i]] [+ residual[i]], dequantised. A token id outside the table
// counts as a row of zeros. `out` may be `residual`. The table is packed (on the CPU) or dense.
struct EmbeddingParams {
  const std::int32_t* token_ids;  // [num_tokens]
  const WeightSegment* segments;  // [num_segments]; none where the table is dense
  const void* table;              // [table_rows, cols], table_dtype, or nullptr
  const void* residual;           // [num_tokens, cols], dtype, or nullptr
  void* out;                      // [num_tokens, cols], dtype
  DType table_dtype;              // f32, f16 or bf16
  DType dtype;                    // f32; on CUDA also f16 or bf16
  float scale;
  std::int64_t num_tokens, cols, num_segments, table_rows;
  std::int64_t table_stride, residual_stride, out_stride;  // per row, in elements
};

FULLBEAM_DECLARE_OP(embedding, EmbeddingParams)

}  // namespace fullbeam
