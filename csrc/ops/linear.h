// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "core/weight.h"

namespace fullbeam {

// out = x * weight^T [+ bias] [+ residual]. Quantised weights meet activations that are quantised
// to int8 per 32 columns, d = max|x| / 127, with exact integer sums inside a tile of 32 columns;
// float weights meet float activations. `out` may be `residual`. Where only each token's largest
// value matters, the others may be anything from their true value up, as long as it is below it.
struct LinearParams {
  const float* x;                 // [num_tokens, cols]
  const WeightSegment* segments;  // [num_segments]
  const float* bias;              // [rows] or nullptr
  const float* residual;          // [num_tokens, rows] or nullptr
  float* out;                     // [num_tokens, rows]
  std::int64_t num_tokens, cols, rows, num_segments, num_panels;
  std::int64_t x_stride, residual_stride, out_stride;  // per token, in elements
  bool largest_only;                                   // then residual is nullptr
};

FULLBEAM_DECLARE_OP(linear, LinearParams)

}  // namespace fullbeam
